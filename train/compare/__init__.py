"""Several runs side by side: ``python -m train report RUN [RUN...]``. The data flows from file to file:

``reading``    run directories → what their files tell
``figures``    that → rows of tables, points of curves
``drawing``    points → curves: SVG for the page, or a PNG that also shows the main figures
``page.html``  the page, a template
``command``    all of it → a file
"""

from train.compare.command import report

__all__ = ["report"]

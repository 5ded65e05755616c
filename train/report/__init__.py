"""What a person sees of runs.

``console``    progress, tables and the curves of one run, while it trains
``examples``   examples as text that a person can check
``writers``    metrics to TensorBoard and Weights & Biases
``reading``    run directories: what their files tell
``figures``    rows of tables, points of curves
``curves``     points as curves: SVG for the page, or a PNG
``page``       the page of ``python -m train report``, from the template ``page.html``
"""

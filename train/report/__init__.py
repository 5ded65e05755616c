"""The output of a run, and reports on runs.

``console``    the progress of a run, its tables of metrics, and the plot of its curves
``examples``   training examples as text
``writers``    records to TensorBoard and Weights & Biases
``reading``    run directories, read for a report
``tables``     rows of tables, points of curves
``curves``     curves: SVG for the page, or a PNG
``page``       the page of ``python -m train report``, from the template ``page.html``
"""

"""A training program over jlora: ``python -m train``. Read it in the order in which the data flows:

``__main__``  the command line: a config file, overrides, errors that name the way out
``config``    what can be configured (the schema of ``configs/``)
``checks``    what of it is refused before anything is built
``run``       the whole story on one page: base, adapters, figures
``data``      a source → a table
``tasks/``    a table → examples; the loss, the measurements, the figures (``metrics``)
``batches``   examples → batches of few shapes
``networks``  the networks, as functions of their parameters; they know nothing of LoRA
``base``      the base of a network without a checkpoint, trained once and cached
``optim``     schedule and optimizer
``step``      one pure step
``loop``      epochs of steps
``evaluate``  what a model makes of all examples
``report``    progress, tables, curves
``store``     files: arrays, JSON, the run directory
``runs``      a finished run, opened again
``commands``  what can be done with it: predict, generate, eval, export; and inspect

The program imports jlora; jlora never imports it.
"""

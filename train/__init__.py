"""A training program over jlora: ``python -m train``. Read it in the order in which the data flows:

``__main__``  the command line: a config file, overrides, errors that name the way out
``config``    what can be configured (the schema of ``configs/``), and what is refused
``run``       the whole story on one page: base, adapters, merge, detach
``data``      parquet file → arrays → a domain → batches
``model``     the network; it knows nothing of LoRA
``base``      the base's parameters, trained once and cached
``tasks``     what the task is: inputs, loss, predictions
``optim``     schedule and optimizer
``step``      one pure step
``loop``      epochs of steps
``evaluate``  predictions and accuracy
``report``    progress, tables, curves
``store``     files: arrays, JSON, the run directory

The program imports jlora; jlora never imports it.
"""

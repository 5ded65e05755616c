"""The training loop.

``progress``     when something is due, and where a training is
``evaluate``     a model's measurements on all examples
``checkpoints``  what a training goes on from, on the same devices or on others
``stop``         SIGTERM and Ctrl-C: a question that the loop asks
``loop``         steps, with metrics, evaluations and checkpoints on the way
``extend``       a run that goes on with more epochs than it was planned with
``run_files``    the files of a run while it trains
"""

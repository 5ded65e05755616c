"""The training loop.

``state``        intervals, averages, and the loop's part of a checkpoint
``stop``         Ctrl-C and SIGTERM
``evaluate``     metrics of a model on all examples
``checkpoints``  checkpoints, to resume on the same or other devices
``extend``       a run extended by more epochs
``feed``         the batch of each step, built ahead of it
``run_files``    the metrics and checkpoints of a run during training
``loop``         the steps, and the evaluations, records and checkpoints between them
"""

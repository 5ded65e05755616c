"""The training loop.

``state``        when something is due, averages, and the loop's part of a checkpoint
``stop``         Ctrl-C and SIGTERM
``evaluate``     metrics of a model on all examples
``checkpoints``  what a training is resumed from, on the same devices or on others
``extend``       a run with more epochs than it was planned with
``feed``         the batch of each step
``run_files``    the metrics and checkpoints of a run in training
``loop``         a step, and what is due after it
"""

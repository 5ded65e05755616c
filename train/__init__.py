"""A training program over jlora: ``python -m train``. Read it in the order of the data flow:

``__main__``    the command line: a config file, flags, commands, exit codes
``config/``     the schema of a configuration: each field with its type, constraint, default and help
``experiment``  a run, from its configuration to its summary
``job``         the parts of a run: examples, network, task, layout and plan
``summary``     the output at the start and end of a run, and its summary
``data/``       sources: tables, then batches of few shapes
``networks/``   the networks, as functions of their parameters
``tasks/``      tables: examples; the loss, the metrics
``compute/``    one step, and its layouts: one device (jit), copies (pmap), sharded weights (mesh)
``pretrain``    the base of a network without a checkpoint, trained once and cached
``loop/``       steps, with metrics, evaluations and checkpoints; SIGTERM and Ctrl-C
``rundir/``     the files of a run directory
``report/``     output for people: progress, tables, curves, pages
``ahead``       a run's step, compiled for devices that may not be there
``commands/``   one file each: fit, show, plan, predict, generate, eval, export, report, inspect

The program imports jlora; jlora never imports it. Each package lists its modules in ``__init__``.
"""

import os

# transformers warns at its first import that it found no torch, which is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

"""A training program over jlora: ``python -m train``. Read it in the order in which the data flows:

``__main__``    the command line: a config file, flags, commands, exit codes
``config/``     the schema of a configuration: each field with its type, constraint, default and help
``experiment``  a run, from its configuration to its summary
``job``         what a run is made of: examples, network, task, layout and plan
``summary``     what a run prints at its start and end, and its summary
``data/``       sources: tables, then batches of few shapes
``networks/``   the networks, as functions of their parameters
``tasks/``      tables: examples; the loss, the metrics
``compute/``    one step, and where it is computed: one device (jit), copies (pmap), sharded weights (mesh)
``pretrain``    the base of a network without a checkpoint, trained once and cached
``loop/``       steps, with metrics, evaluations and checkpoints on the way; SIGTERM and Ctrl-C
``rundir/``     what a run directory holds
``report/``     what a person sees: progress, tables, curves, pages
``commands/``   one file each: fit, show, predict, generate, eval, export, report, inspect

The program imports jlora; jlora never imports it. Every room says in its ``__init__`` what is in it.
"""

import os

# transformers warns at its first import that it found no torch, which is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

"""A training program over jlora: ``python -m train``. Read it in the order in which the data flows:

``__main__``     the command line: a config file, overrides, errors that name the way out
``config``       what can be configured (the schema of ``configs/``)
``checks``       what of it is refused before anything is built
``run``          the whole story on one page: base, adapters, figures
``job``          a configuration → all that it is made of: data, network, task, layout, plan
``processes``    several processes: how they find each other, and what they agree on
``data``         a source → a table
``networks``     the networks, as functions of their parameters; they know nothing of LoRA
``tasks/``       a table → examples; the loss, the measurements, the figures (``metrics``)
``batches``      examples → batches of few shapes
``parallel``     where a step is computed: one device (jit), copies (pmap), sharded weights (mesh)
``rundir``       the run's directory: found again or made anew, held by one run at a time
``stop``         SIGTERM and SIGINT → a question that the loop asks
``kept``         the files of a run that trains: records, checkpoints, from where it goes on
``keys``         random keys, one for each purpose
``base``         the base of a network without a checkpoint, trained once and cached
``optim``        schedule and optimizer
``step``         one pure step
``flops``        what a step computes, and the peaks of devices
``loop``         steps, with records, measurements and checkpoints on the way
``progress``     the pace of a training, and its position
``further``      a run that goes on with more epochs than it was planned with
``checkpoints``  a training → what it goes on from, on the same devices or on others
``look``         examples → text that a person can check
``evaluate``     what a model makes of all examples
``records``      what a run tells of itself → ``metrics.jsonl``
``writers``      the same → TensorBoard, Weights & Biases
``gauges``       records → speed; and memory
``report``       progress, tables, curves of a run
``store``        files: arrays, JSON, the run directory
``runs``         a finished run, opened again
``compare/``     several runs side by side, on one page
``commands/``    one file each: show what would be learnt; predict, generate, eval, export, report; and inspect

The program imports jlora; jlora never imports it.
"""

"""The commands: a file each. A command is a function; its parameters are the flags, and its docstring is the help.

``fit``       train, the default
``show``      the examples of a configuration; also takes all of its flags
``plan``      what a step needs, compiled for a machine that need not be there
``predict``   label texts
``generate``  continue prompts
``eval``      evaluate a run, also on other data
``export``    write a run for other programs
``report``    compare runs on a page
``inspect``   the weights of a checkpoint that would be adapted

predict and generate read ``inputs`` and write ``results``; show draws images on a ``contact_sheet``. The flags of show
and plan are in ``options``.
"""

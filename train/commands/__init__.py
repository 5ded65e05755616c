"""The commands: a file each. A command is a function; its parameters are the flags, and its docstring is the help.

``fit``       train, the default
``show``      what a configuration would train on; takes all flags of a configuration too
``predict``   label texts
``generate``  continue prompts
``eval``      evaluate a run, also on other data
``export``    write a run for other programs
``report``    compare runs on a page
``inspect``   what of a checkpoint would be adapted

``inputs`` and ``results`` are what predict and generate read and write; ``contact_sheet`` is how show draws images.
"""

"""Several trainings on one base in one program (`train.config.SweepConfig`).

``members``  a configuration to those of its members
``stacked``  the members' adapters as one tree, and what differs between members as arrays
``program``  one compiled step of several members, and its placement on devices
``halving``  which members go on: rungs of successive halving
``state``    the state of a round in a checkpoint
``files``    the files of a sweep, of its rounds and of their members
``loop``     the training of a round: records, evaluations, and members that leave it
``rounds``   members divided into programs: by what is compiled, and by memory
``turns``    how many members of a program compute at a time
``results``  how each member ended: ranking, table, summary
``picture``  the metric over the swept values
``ahead``    the programs of a sweep, compiled for devices that may not be here
``run``      a sweep, from its configuration to its summary
"""

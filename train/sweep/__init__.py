"""Several trainings on one base in one program.

``members``   a configuration to those of its members
``stacked``   members' adapters as one tree, and what differs between them as arrays
``program``   one compiled step of several members, and its placement on devices
``state``     the state of a round in a checkpoint
``loop``      the training of a round: records, evaluations, and members that leave it
``rounds``    members divided into programs, by what is compiled and by memory
``results``   what became of each member: table and summary
``picture``   the metric over the values that were swept
``run``       a sweep, from its configuration to its summary
"""

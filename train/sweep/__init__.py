"""Several trainings on one base in one program (`train.config.SweepConfig`).

``members``  the members of a sweep: their names and configurations
``results``  how each ended: ranking, table, summary
``picture``  the metric over the swept values
"""

"""What a run directory holds. Other rooms ask here for the names and the content of its files.

``directory``  the names of its files, and how each is read and written
``records``    ``metrics.jsonl``
``bases``      bases that were trained from scratch
``arrays``     trees of arrays on disk
``codec``      configurations as JSON
``changes``    what of a configuration and its data may change when a run is resumed
``claim``      the directory that a run resumes, or a new one, locked
``finished``   a finished run, opened again
"""

"""Run directories: the names and the content of their files.

``directory``  the names of its files, and their reading and writing
``records``    ``metrics.jsonl``
``bases``      bases trained from scratch
``arrays``     trees of arrays on disk
``codec``      configurations as JSON
``changes``    changes of configuration and data that a resumed run allows
``lock``       one training at a time, on a disk or in a bucket
``claim``      the directory of a resumed or new run, locked
``finished``   a finished run, opened for use
"""

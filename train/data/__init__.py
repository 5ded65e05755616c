"""From sources to batches.

``lines``    text files: encodings and lines
``formats``  files of every kind: rows as they were written
``sources``  files, folders and datasets of the hub, and what is told of them
``tables``   the training and the validation table of a configuration
``cuts``     what a maximal length takes from texts
``batches``  examples in batches of few shapes
"""

"""From sources to batches: sources -> tables -> examples (by `train.tasks`) -> batches.

``lines``        text files: encoding, compression, lines
``delimited``    rows of .csv and .tsv
``json_rows``    rows of .json and .jsonl
``formats``      files of any format as Arrow tables
``cache_folder`` folders of a cache, complete or absent
``arrow_cache``  files as one memory-mapped dataset, cached by content
``sources``      a file, a folder or a dataset on the hub as rows with their provenance
``tables``       the training and the validation table of a configuration, and checked columns
``truncation``   tokens that ``max_length`` cuts from texts
``ragged``       columns of rows of different lengths, in memory or memory-mapped
``batches``      examples as padded batches of few shapes
"""

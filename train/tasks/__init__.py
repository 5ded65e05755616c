"""Tasks: tables in, examples out; outputs of a network in, losses, metrics and predictions out.

``encoding``       encoded examples, cached on disk
``base``           the interface of a task
``metrics``        metrics over all examples
``labels``         a column of labels as classes or numbers
``classify``       classification and regression of texts
``pictures``       image files and pixels as arrays
``images``         classification of images
``spans``          texts with loss spans, as tokens with a loss mask
``conversations``  a row's messages and tools, checked
``chat``           messages in a chat template, as texts with spans
``language``       language modelling
``registry``       the task of a configuration
``stand_in``       a task and the shapes of its batches, without data
"""

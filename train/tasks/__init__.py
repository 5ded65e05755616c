"""The tasks, one interface: text and image classification, regression, language modelling.

``base``      the interface
``metrics``   what is measured
``labels``    columns of labels as classes or numbers
``classify``  classification and regression of texts
``pictures``  image files as arrays
``images``    classification of images
``marked``    texts with the parts that are learnt, as tokens
``chat``      conversations in a chat template
``language``  language modelling
``registry``  the task of a configuration
"""

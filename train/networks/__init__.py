"""The networks, as functions of their parameters. They contain no LoRA code.

``network``     the interface
``scratch``     networks trained from scratch: a patch transformer, an MLP
``tokenizers``  tokenizers of checkpoints
``pretrained``  networks of `jlora.models`, with a checkpoint's weights
``registry``    the network of a configuration
"""

"""The Vision Transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929)."""

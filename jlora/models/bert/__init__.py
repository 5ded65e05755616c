"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805) and RoBERTa (Liu et al. 2019, 1907.11692)."""

"""Frozen weights in few bits: schemes, their numerics, and trees of parameters."""

"""Models from four libraries that know nothing of jlora, and plain functions; see `tests/engine/test_libraries.py`."""

from . import convolutions, equinox, haiku, linen, nnx, plain
from ._model import MODELS, Model
from ._reference import merged, pulled_back

__all__ = [
    "MODELS",
    "Model",
    "convolutions",
    "equinox",
    "haiku",
    "linen",
    "merged",
    "nnx",
    "plain",
    "pulled_back",
]

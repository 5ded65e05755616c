# ruff: noqa: F401, F403  (re-exports)
"""LoRA for any JAX program: a pure transform of parameter trees. See the README for the first five lines."""

import sys
import typing

# Needs no jax, so that a command line can check a configuration before it imports jax, which takes most of a second.
from jlora._src.config import HEADS, LoraConfig, Override
from jlora._src.quantization.scheme import Scheme

__version__ = "0.1.0"

if typing.TYPE_CHECKING or "jax" in sys.modules:
    from jlora._src.api import *
    from jlora._src.api import __all__
else:

    def __getattr__(name: str) -> object:
        """Imports every other name, and jax, when the first one is used."""
        from jlora._src import api

        globals().update({public: getattr(api, public) for public in ("__all__", *api.__all__)})
        if name in globals():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})

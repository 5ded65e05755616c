"""The flags of the commands that also take those of a configuration. They are parsed before jax is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ShowOptions:
    """Show a run's training data: examples with the tokens that carry loss marked, lengths, labels.

    Reads and encodes the data like `python -m train CONFIG.py`, and takes the same flags; see its --help. Reads no
    weights.
    """

    #: Number of examples to show, from the first; for images, per label.
    examples: int = 3
    #: Put a bar between tokens.
    tokens: bool = False
    #: PNG to write, for images. Default: examples.png.
    out: Path | None = None


@dataclass(frozen=True)
class PlanOptions:
    """Compile a run's training step for a machine that need not be there, and print what it needs: memory on each
    device, collectives, FLOPs, an estimate of its time.

    Takes the same flags as `python -m train CONFIG.py`; see its --help. Reads config.json, and no weights or data. If
    the step does not fit, others are compiled until one does. Of a sweep, as many members are compiled at once as fit.
    """

    #: TPU slice to compile for, such as v5e:1x1, v5p:2x2x1 or v6e:4x4 (needs libtpu). Default: the devices here.
    topology: str | None = None
    #: Print JSON.
    json: bool = False
    #: Look for settings that fit, where these do not.
    advise: bool = True

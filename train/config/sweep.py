"""A sweep: several trainings on one base in one program."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from train.config.fields import Constraint, Count, Fraction, NotNegative, Part, Positive, Seed, Source, at_least, flag

MOST = 4096
"""The largest number of members."""

LORA_ONLY = ("rank", "alpha", "dropout", "lora_plus")
"""Swept fields of adapters."""


def _each_once(words: str, example: str) -> Constraint:
    """Distinct values; none is allowed."""
    return Constraint(f"{words}, each once", lambda x: len({*x}) == len(x), example)


Sources = Annotated[tuple[Source, ...], _each_once("files, folders or names of datasets", "a.jsonl,b.jsonl")]
Ranks = Annotated[tuple[Count, ...], _each_once("whole numbers >= 1", "4,8,16")]
Alphas = Annotated[tuple[Positive, ...], _each_once("numbers > 0", "8,16")]
Dropouts = Annotated[tuple[Fraction, ...], _each_once("fractions, 0 <= x < 1", "0,0.1")]
Rates = Annotated[tuple[Positive, ...], _each_once("numbers > 0", "1e-4,3e-4,1e-3")]
Ratios = Annotated[tuple[Positive, ...], _each_once("numbers > 0", "1,16")]
Decays = Annotated[tuple[NotNegative, ...], _each_once("numbers >= 0", "0,0.01")]
Seeds = Annotated[tuple[Seed, ...], _each_once("whole numbers >= 0", "0,1,2")]


@dataclass(frozen=True)
class SweepConfig(Part):
    """Several trainings on one base in one program: one for each combination of the values below, which are separated
    by commas or spaces. They replace the configured value.
    """

    #: Data sets, each with adapters of its own, instead of data.train. One local folder: the data files and folders in
    #: it. --data.train a.jsonl,b.jsonl is the same.
    data: Sources = ()
    #: Ranks, instead of lora.rank. The alpha stays.
    rank: Ranks = ()
    #: Alphas, instead of lora.alpha.
    alpha: Alphas = ()
    #: Dropout rates, instead of lora.dropout.
    dropout: Dropouts = ()
    #: Peak learning rates, instead of the mode's.
    lr: Rates = ()
    #: Ratios of LoRA+, instead of fit.lora_plus.
    lora_plus: Ratios = ()
    #: Weight decays, instead of fit.weight_decay.
    weight_decay: Decays = ()
    #: Seeds, instead of the configured one.
    seed: Seeds = ()
    #: Successive halving (Jamieson and Talwalkar 2016): at each rung only the best 1/halving of the trainings in a
    #: program go on. Default: all train to the end.
    halving: Annotated[int, at_least(2)] | None = None
    #: Most trainings in one program at a time. Default: as many as fit in memory.
    at_once: Count | None = None

    def __bool__(self) -> bool:
        """Whether anything is swept."""
        return bool(self.given)

    @property
    def given(self) -> dict[str, tuple[Any, ...]]:
        """The swept fields and their values, in the order of the fields."""
        fields = (field.name for field in dataclasses.fields(self) if field.name not in ("halving", "at_once"))
        return {name: values for name in fields if (values := getattr(self, name))}

    def conflicts(self) -> Iterator[str]:
        count = math.prod(map(len, self.given.values()))
        if count > MOST:
            fields = " x ".join(f"{len(values)} of {name}" for name, values in self.given.items())
            yield f"{next(iter(self.given))}: got {count:,} trainings ({fields}), expected at most {MOST:,}; pass fewer"
        if self.halving is not None and len(self.data) > 1:
            yield (
                f"halving: got {self.halving} with {len(self.data)} data sets, expected None: metrics on "
                "different data do not compare; pass --sweep.halving None"
            )
        elif self.halving is not None and count < 2:
            yield (
                f"halving: got {self.halving} with one training, expected at least two to choose from; "
                "pass more values, or --sweep.halving None"
            )
        if self.at_once is not None and not self:
            yield f"at_once: got {self.at_once}, but nothing is swept; pass values, such as --sweep.lr 1e-4,1e-3"

    @property
    def flags(self) -> str:
        """The flags of the swept fields, for messages."""
        return " and ".join(flag(f"sweep.{name}") for name in self.given)


def sources(text: str) -> tuple[str, ...]:
    """The sources in a text, separated by commas; a single one if a local file or folder has that very name."""
    path = os.path.expanduser(text)
    if any(Path(one).exists() for one in (path, path.rpartition(":")[0]) if one):
        return (text,)
    return tuple(one.strip() for one in text.split(",")) if "," in text else (text,)

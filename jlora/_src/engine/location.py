"""The place of an equation in a program, for messages and FLOP counts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jlora._src.engine import compat


@dataclasses.dataclass
class Location:
    """The current place of a walk over a jaxpr and its inner jaxprs.

    Attributes:
      enclosing: the equations around the current one, the innermost last.
      repeats: the number of times that the current equation runs: the product of the lengths of the scans around it.
    """

    enclosing: list[Any] = dataclasses.field(default_factory=list)
    repeats: int = 1

    def source_line(self, eqn: Any) -> str:
        """The user's source line of ``eqn``, or of the equation around it."""
        return compat.source_line(eqn, self.enclosing)

    @contextlib.contextmanager
    def inside(self, eqn: Any) -> Iterator[None]:
        """Enter the inner jaxprs of ``eqn``."""
        self.enclosing.append(eqn)
        try:
            yield
        finally:
            self.enclosing.pop()

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Multiply the counts inside by ``times``."""
        outside, self.repeats = self.repeats, self.repeats * times
        try:
            yield
        finally:
            self.repeats = outside

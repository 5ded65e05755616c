"""Where in a program an equation is, for messages and for counting what it computes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jlora._src.engine import compat


@dataclasses.dataclass
class Location:
    """The place that a walk over a jaxpr and its inner jaxprs has reached.

    Attributes:
      enclosing: the equations around the current one, the innermost last.
      repeats: how often the current equation runs: the product of the lengths of the scans around it.
    """

    enclosing: list[Any] = dataclasses.field(default_factory=list)
    repeats: int = 1

    def source_line(self, eqn: Any) -> str:
        """The line of the user's code that made ``eqn``, or the equation around it."""
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
        """Count everything inside ``times`` times."""
        outside, self.repeats = self.repeats, self.repeats * times
        try:
            yield
        finally:
            self.repeats = outside

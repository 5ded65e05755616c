"""The state of a round: what a checkpoint of its members holds besides arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from train.loop.state import LoopState


@dataclass
class MemberState:
    """A member of a round.

    Attributes:
      loop: as of its single run.
      measured: the metrics of its kept adapters, by set and name; empty before the first evaluation.
      ended: why it is no longer trained; None while it is.
      diverged: whether that is because its loss or gradient was not finite.
    """

    loop: LoopState = field(default_factory=LoopState)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    ended: str | None = None
    diverged: bool = False

    def to_json(self) -> dict[str, Any]:
        """The state as JSON; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> MemberState:
        """The state from `to_json`; raises as `LoopState.from_json`."""
        return MemberState(**{**value, "loop": LoopState.from_json(value["loop"])})


@dataclass
class RoundState:
    """The members of a round, in the order of the round.

    Attributes:
      members: of the round.
      slots: the members in the program, by index; those that ended may still be among them.
      step, seconds: of the round.
      eval_pending: whether evaluations of this step are due and not done yet.
    """

    members: list[MemberState]
    slots: list[int]
    step: int = 0
    seconds: float = 0.0
    eval_pending: bool = False
    best_step: None = None  # members keep their own best adapters

    @staticmethod
    def of(count: int) -> RoundState:
        """The state before the first step."""
        return RoundState([MemberState() for _ in range(count)], [*range(count)])

    @property
    def live(self) -> list[int]:
        """The members that are trained."""
        return [i for i in self.slots if self.members[i].ended is None]

    def to_json(self) -> dict[str, Any]:
        """The state as JSON; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> RoundState:
        """The state from `to_json`.

        Raises:
          KeyError, TypeError: for anything else.
        """
        return RoundState(**{**value, "members": [MemberState.from_json(one) for one in value["members"]]})

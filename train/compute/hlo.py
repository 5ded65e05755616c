"""The text of a compiled program: its computations, their instructions, and how often its loops run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\(([^)]*)\)")
_SAME_VALUE = ("copy", "convert", "bitcast")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      result: the shape of its result, such as ``bf16[4,1024]{1,0}``; several in parentheses.
      arguments: as printed: names of operands, or the value of a constant.
      line: all of it.
    """

    name: str
    result: str
    opcode: str
    arguments: str
    line: str

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def called(self, *roles: str) -> list[str]:
        """The computations that it names as ``role=%name``."""
        return re.findall(rf"\b(?:{'|'.join(roles)})=%?([\w.-]+)", self.line)


@dataclass
class Computation:
    """Instructions by name, and the one that computes the result."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None


@dataclass
class Module:
    """A program.

    Attributes:
      entry: the name of the computation that runs.
    """

    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often a ``while`` runs; None if that depends on more than constants.

        XLA notes it for CPUs and GPUs. For TPUs it is found here, for loops that count up to a limit, such as a scan.
        """
        if noted := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.line):
            return int(noted[1])
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        test = self.computations[condition].root
        if test is None or test.opcode != "compare" or "direction=LT" not in test.line:
            return None
        counter, limit = test.operands
        index, last = self._element(counter, condition), self._constant(limit, condition)
        if index is None or last is None:
            return None
        first, step = self._initial(body, index), self._step(body, index)
        return None if first is None or not step else max(0, -((first - last) // step))

    def _step(self, body: str, index: int) -> int | None:
        """What an iteration adds to an element of the loop's state; 0 if it does not change it."""
        root = self.computations[body].root
        if root is None or root.opcode != "tuple":
            return None
        new = self.computations[body].instructions.get(root.operands[index])
        while new is not None and new.opcode in _SAME_VALUE:
            new = self.computations[body].instructions.get(new.operands[0])
        if new is None or new.opcode != "add":
            return 0 if new is not None and self._element(new.name, body) == index else None
        elements = [self._element(name, body) for name in new.operands]
        return self._constant(new.operands[1 - elements.index(index)], body) if index in elements else None

    def _element(self, name: str, where: str) -> int | None:
        """The position in the computation's only parameter, a tuple, that a value is read from."""
        found = self.computations[where].instructions.get(name)
        while found is not None and found.opcode in _SAME_VALUE:
            found = self.computations[where].instructions.get(found.operands[0])
        if found is None or found.opcode != "get-tuple-element":
            return None
        source = self.computations[where].instructions.get(found.operands[0])
        position = re.search(r"index=(\d+)", found.line[found.line.index(found.operands[0]) :])
        return int(position[1]) if position and source is not None and source.opcode == "parameter" else None

    def _constant(self, name: str, where: str) -> int | None:
        """The value of an integer, if it is the same whenever the program runs."""
        found = self.computations[where].instructions.get(name)
        if found is None:
            return None
        if found.opcode == "constant":
            return int(found.arguments) if re.fullmatch(r"-?\d+", found.arguments) else None
        if found.opcode in _SAME_VALUE:
            return self._constant(found.operands[0], where)
        if (index := self._element(name, where)) is None or where not in self._loops:
            return None
        body = self._loops[where][1].called("body")[0]
        return self._initial(body, index) if self._step(body, index) == 0 else None

    def _initial(self, body: str, index: int) -> int | None:
        """An element of a loop's state before the first iteration."""
        where, loop = self._loops[body]
        state = self.computations[where].instructions.get(loop.operands[0])
        return self._constant(state.operands[index], where) if state is not None and state.opcode == "tuple" else None

    @cached_property
    def _loops(self) -> dict[str, tuple[str, Instruction]]:
        """For the body and the condition of each loop: the computation that runs it, and its instruction."""
        return {
            part: (name, loop)
            for name, computation in self.computations.items()
            for loop in computation.instructions.values()
            if loop.opcode == "while"
            for part in loop.called("body", "condition")
        }


def parse(text: str) -> Module:
    """The module that XLA prints."""
    found: dict[str, Computation] = {}
    entry, own = "", Computation()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            own = found[head[2]] = Computation()
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, result, opcode, arguments = match.groups()
            instruction = own.instructions[name] = Instruction(name, result, opcode, arguments, line)
            own.root = instruction if root else own.root
    return Module(found, entry)

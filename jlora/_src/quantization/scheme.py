"""`Scheme`: how weights are quantized, by name. Needs no jax."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal, get_args, get_type_hints

from jlora.fields import Within, faults
from jlora.messages import bullets, shown

Format = Literal["nf4", "int4", "int8", "fp8", "mxfp4"]
_FORMATS: tuple[str, ...] = get_args(Format)
_BLOCKS: dict[str, int] = {"nf4": 64, "mxfp4": 32}
"""The blocks of the formats that are defined by blocks."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a weight is quantized. Wherever one is expected, its name will do: ``"nf4"``, ``"int4-64"``.

    - ``nf4``: 4-bit codes of normal quantiles in blocks of 64, with quantized scales (QLoRA, Dettmers et al. 2023,
      https://arxiv.org/abs/2305.14314), as bitsandbytes makes them: 4.13 bits a weight.
    - ``int8``, ``int4``: rounded to 255 or 15 multiples of a scale for each output channel.
    - ``fp8``: float8_e4m3fn with a scale for each output channel.
    - ``mxfp4``: float4_e2m1fn in blocks of 32 with powers of two as scales (OCP Microscaling Formats, v1.0): 4.25 bits.

    A name with a number divides the inputs of each channel into blocks: ``int4-64`` has 4.5 bits a weight, and
    loses less than ``int4``.

    Attributes:
      format: of the codes.
      block: the entries, along the inputs, that share a scale; None for all of an output channel.
      double: whether the scales are quantized too, to 8 bits in groups of up to 256. Only for ``nf4``; its default.

    Raises:
      ValueError: if a field is out of range.
    """

    format: Format
    block: Annotated[int, Within(0, above=True)] | None = None
    double: bool | None = None

    def __post_init__(self) -> None:
        if self.block is None:
            object.__setattr__(self, "block", _BLOCKS.get(self.format))
        if self.double is None:
            object.__setattr__(self, "double", self.format == "nf4")
        wrong = faults(dataclasses.asdict(self), get_type_hints(Scheme, include_extras=True))
        if self.double and self.format != "nf4":
            wrong.append(f"double = True; expected False with {self.format!r}: only nf4 has quantized scales")
        if wrong:
            raise ValueError(f"Scheme: {len(wrong)} field(s) are out of range:{bullets(wrong)}")

    @classmethod
    def parse(cls, name: str | Scheme) -> Scheme:
        """The scheme of a name, such as ``nf4`` or ``int4-64``.

        Raises:
          ValueError: if it is not the name of a scheme.
        """
        if isinstance(name, Scheme):
            return name
        found = re.fullmatch(rf"({'|'.join(_FORMATS)})(-[1-9]\d*)?", name) if isinstance(name, str) else None
        if found is None:
            raise ValueError(
                f"got the scheme {shown(name)}; expected one of {', '.join(_FORMATS)}, also with a block, as in "
                "'int4-64', or a jlora.Scheme"
            )
        return cls(found[1], None if found[2] is None else int(found[2][1:]))  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        block = "" if self.block == _BLOCKS.get(self.format) else f"-{self.block}"
        return self.format + block + (" with float32 scales" if self.format == "nf4" and not self.double else "")

"""Rotary positions (Su et al. 2021), and their scalings beyond the training length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.fields import Within, faults
from jlora.files.errors import ModelError
from jlora.messages import bullets
from jlora.models._family import NonNegative, Positive, Size

# The types of parameters; the required and optional ones of each kind.
_PARAMETERS: dict[str, Any] = {
    "rope_theta": Annotated[float, Within(1, above=True)],
    "rope_type": str,
    "type": str,
    "partial_rotary_factor": float,
    "original_max_position_embeddings": Size,
    "mscale": NonNegative,
    "mscale_all_dim": NonNegative,
    "truncate": bool,
    **dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"), Positive
    ),
}
_COMMON_PARAMETERS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_KINDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        set(),
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}


@dataclass(frozen=True)
class Rope:
    """How positions rotate queries and keys.

    Attributes:
      kind: ``default``, ``linear`` (all positions divided by ``factor``), ``dynamic`` (the base grows with the length
        of the call), ``llama3`` (low frequencies divided) or ``yarn`` (Peng et al. 2023).
      theta: the base of the wavelengths.
      factor: of the length extension.
      trained: the number of positions before the extension; in ``dynamic``, the length up to which nothing changes.
      low, high: in llama3, wavelengths per ``trained`` between which the division fades in; in yarn, rotations.
      attention: in yarn, multiplies cosine and sine.
      truncate: round yarn's bounds to whole dimensions.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    trained: int = 0
    low: float = 1.0
    high: float = 1.0
    attention: float = 1.0
    truncate: bool = True


def read_rope(hf: Mapping[str, Any], size: int) -> Rope:
    """Read a config.json: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (4).

    Args:
      hf: the content of the file; its attributes have the declared types.
      size: of a head.

    Raises:
      ModelError: for an unknown kind, or parameters that are missing, unknown or of another type.
    """
    stated = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    given = {name: value for name, value in stated.items() if value is not None}
    given.setdefault("rope_theta", hf.get("rope_theta") or 10000.0)
    kind = _read_kind(given, stated)
    if size % 2 or kind == "dynamic" and size == 2:
        raise ModelError(
            f"head_dim = {size}; expected an even size, since positions rotate pairs, and above 2 for 'dynamic'"
        )
    length = hf.get("max_position_embeddings") or 2048
    # `dynamic` starts at the length of the configuration, whatever the training length.
    trained = length if kind == "dynamic" else given.get("original_max_position_embeddings", length)
    rope = Rope(kind, given["rope_theta"], given.get("factor", length / trained), trained)
    if kind == "llama3":
        if given["low_freq_factor"] >= given["high_freq_factor"]:
            raise ModelError(f"low_freq_factor in {stated}; expected less than high_freq_factor")
        return replace(rope, low=given["low_freq_factor"], high=given["high_freq_factor"])
    if kind == "yarn":
        return replace(
            rope,
            low=given.get("beta_slow") or 1.0,
            high=given.get("beta_fast") or 32.0,
            attention=_yarn_attention(rope.factor, given),
            truncate=given.get("truncate", True),
        )
    return rope if kind != "default" else replace(rope, factor=1.0)


def _read_kind(given: Mapping[str, Any], stated: Mapping[str, Any]) -> str:
    """The kind of rotary positions, with its parameters checked; ``stated`` is for messages."""
    if wrong := faults(given, _PARAMETERS):
        raise ModelError(f"rotary positions, in rope_theta or {stated}:{bullets(wrong)}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial_rotary_factor: this network rotates whole heads; expected 1 or none")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _KINDS:
        raise ModelError(
            f"rotary positions of the kind {kind!r} in {stated} are unknown; expected one of {', '.join(_KINDS)}"
        )
    required, optional = _KINDS[kind]
    wrong = [f"{name} is missing" for name in sorted(required - set(given))]
    wrong += [
        f"{name} = {value!r} is unknown"
        for name, value in given.items()
        if name not in required | optional | _COMMON_PARAMETERS
    ]
    if wrong:
        raise ModelError(
            f"rotary positions of the kind {kind!r}:{bullets(wrong)}\nExpected {sorted(required | optional)} only."
        )
    return kind


def rotations(rope: Rope, size: int, position_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [batch, length, 1, size / 2], of positions int [batch, length]."""
    if rope.kind == "dynamic":
        # As in transformers, the longest row of the call determines it for all.
        longest = jnp.maximum(position_ids.max() + 1, rope.trained).astype(jnp.float32)
        stretch = rope.factor * longest / rope.trained - (rope.factor - 1)
        exponents = np.arange(0, size, 2, dtype=np.float32) / size
        frequencies = (rope.theta * stretch ** (size / (size - 2))) ** -exponents
    else:
        frequencies = jnp.asarray(_frequencies(rope, size), jnp.float32)
    angles = position_ids.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles) * rope.attention, jnp.sin(angles) * rope.attention


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Queries or keys [batch, length, heads, size] rotated by their positions, computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _frequencies(rope: Rope, size: int) -> np.ndarray:
    """Radians per position, float64 [size / 2]."""
    plain = rope.theta ** -(np.arange(0, size, 2) / size)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        waves = rope.trained * plain / (2 * np.pi)
        kept = np.clip((waves - rope.low) / (rope.high - rope.low), 0, 1)
    else:
        kept = 1 - _yarn_ramp(rope, size)
    return kept * plain + (1 - kept) * plain / rope.factor


def _yarn_ramp(rope: Rope, size: int) -> np.ndarray:
    """The share of the division for each frequency: 0 for ``high`` rotations in the training length, 1 for ``low``."""

    def dimension(rotations: float) -> float:
        return size * math.log(rope.trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    start, stop = dimension(rope.high), dimension(rope.low)
    if rope.truncate:
        start, stop = math.floor(start), math.ceil(stop)
    start, stop = max(start, 0), min(stop, size - 1)
    return np.clip((np.arange(size // 2) - start) / ((stop - start) or 0.001), 0, 1)


def _yarn_attention(factor: float, given: Mapping[str, Any]) -> float:
    if (attention := given.get("attention_factor")) is not None:
        return attention

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return temperature(given["mscale"]) / temperature(given["mscale_all_dim"])
    return temperature(1.0)

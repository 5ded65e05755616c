"""Speed and memory of training."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

SPEEDS = (
    "step_seconds",
    "examples_per_second",
    "tokens_per_second",
    "loss_tokens_per_second",
    "padding",
    "input",
    "mfu",
)

NOTABLE = 0.01
"""The smallest share of time spent waiting for input that is shown in a log."""


def speed(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median of each speed metric over a run's records, without compilation."""
    epochs = [one for one in records if one["phase"] == "fit" and "epoch" in one]
    lines = [one for one in records if one["phase"] == "fit" and "epoch" not in one] or epochs
    found = {name: [one[name] for one in lines if name in one] for name in SPEEDS}
    return {name: statistics.median(values) for name, values in found.items() if values}


def peak_memory() -> int:
    """Peak memory so far in bytes: of this process's fullest device, or of the process itself if the devices do not
    report it, as on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def line(summary: Mapping[str, Any]) -> str:
    """The speed and memory in a summary, as a line to print."""
    parts = []
    if "step_seconds" in summary:
        parts.append(f"{1000 * summary['step_seconds']:.1f} ms per step")
        rate = summary["examples_per_second"]
        parts.append(f"{rate:,.{0 if rate >= 10 else 1}f} examples/s")
    if "tokens_per_second" in summary:
        loss = summary.get("loss_tokens_per_second")
        with_loss = "" if loss is None else f" ({loss:,.0f} with loss)"
        parts.append(f"{summary['tokens_per_second']:,.0f} tokens/s{with_loss}, padding {summary['padding']:.0%}")
    if summary.get("input", 0) >= NOTABLE:
        parts.append(f"waiting for input {summary['input']:.0%} of the time")
    if "mfu" in summary:
        parts.append(f"{summary['mfu']:.1%} of the devices' bfloat16 peak")
    parts.append(f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    return f"{summary['layout']}: {', '.join(parts)}"

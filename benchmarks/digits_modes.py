"""How much of full fine-tuning's gain on the shifted digits do LoRA and a new head alone reach?

    python -m benchmarks.digits_modes [any flags of python -m train]

Runs the program in its three modes over three seeds. The ratio is a mode's gain over the base on the shifted test
images, divided by full fine-tuning's: (mode - base) / (full - base).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from jlora.messages import table
from train.__main__ import parse
from train.experiment import run

SEEDS = (0, 1, 2)
MODES = ("full", "lora", "head")


def main(flags: list[str]) -> None:
    rows, ratios = [], []
    with tempfile.TemporaryDirectory(prefix="digits_modes_") as runs:
        for seed in SEEDS:
            found = {mode: _run(flags, seed, mode, Path(runs)) for mode in MODES}
            base = _shifted(found["full"], "base")
            gain = _shifted(found["full"], "adapted") - base
            for mode, summary in found.items():
                shifted = _shifted(summary, "adapted")
                ratio = (shifted - base) / gain
                ratios += [ratio] if mode == "lora" else []
                rows.append(
                    [
                        str(seed),
                        mode,
                        f"{base:.4f}",
                        f"{shifted:.4f}",
                        f"{ratio:.3f}",
                        f"{summary['trainable'] / summary['total']:.2%}",
                        str(summary["differing_predictions"]["merged_vs_adapted"]),
                        f"{summary['seconds']:.1f}",
                    ]
                )
    header = ["seed", "mode", "base", "adapted", "ratio to full", "trained", "merged differs", "seconds"]
    print(f"\n{table(header, rows, right={0, *range(2, len(header))})}")
    print(
        f"\nLoRA keeps {mean(ratios):.3f} of full fine-tuning's gain ({min(ratios):.3f} to {max(ratios):.3f} by seed)"
    )


def _shifted(summary: dict[str, Any], model: str) -> float:
    return summary["metrics"][model]["shifted"]["accuracy"]


def _run(flags: list[str], seed: int, mode: str, runs: Path) -> dict[str, Any]:
    own = ["--seed", str(seed), "--mode", mode, "--run-dir", str(runs / f"{mode}-{seed}")]
    return run(parse([*flags, *own]))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Which slice, and which flags, for Llama 1B, 8B and 70B on TPUs?

    python -m benchmarks.tpu_plans [--tables]

Compiles the training step of ``configs/instruct_llama.py`` (bfloat16, rank 16 on every linear layer, packed rows) for
slices that need not be there, as ``python -m train plan`` does, and writes the table of docs/tpu.md, "What to choose".
Only the shapes of config.json are used; needs libtpu. For each model and chip it tries settings from the smallest slice
to larger ones, and stops at the first that fits.

Results are kept in ``results/tpu_plans.json``, one as soon as it is there, and compiled again only if their code or
compiler changed. ``--tables`` writes what is kept. A compilation takes one to three minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _tpu
from train.__main__ import parse
from train.ahead import step_costs

COMMON = "--lora.rank 16 --lora.alpha 32 --lora.dropout 0 --compute.remat full"
FILE = _tpu.RESULTS / "tpu_plans.json"
CODE = ("jlora/_src", "jlora/models", "train/compute/step.py")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train a model on a slice; a mesh uses all its chips.

    Attributes:
      length: of a packed row, in tokens.
      rows: of a step.
      fsdp, tensor: axes of the mesh; the chips that they leave are along data.
    """

    slice: str
    length: int
    rows: int
    fsdp: int = 1
    tensor: int = 1
    accumulate: int = 1

    @property
    def flags(self) -> str:
        """Layout and accumulation, as a user passes them."""
        chips = math.prod(int(n) for n in self.slice.partition(":")[2].split("x"))
        axes = {"fsdp": self.fsdp, "tensor": self.tensor, "accumulate": self.accumulate}
        flags = [f"--compute.{name} {value}" for name, value in axes.items() if value > 1]
        mesh = ["--compute.layout mesh"] if chips > 1 else []
        return " ".join([*mesh, *flags])

    @property
    def batch_flags(self) -> str:
        """Rows and their length."""
        return f"--fit.batch-size {self.rows} --task.max-length {self.length}"


SETTINGS: dict[str, list[list[Setting]]] = {
    "Llama 3.2 1B": [
        [Setting("v5e:1x1", 4096, 8, accumulate=8), Setting("v5e:1x1", 2048, 16, accumulate=16)],
        [Setting("v5p:2x2x1", 4096, 16, accumulate=2)],
        [Setting("v6e:1x1", 4096, 8, accumulate=8)],
        [Setting("v5e:1x1", 1024, 32, accumulate=8)],
        [Setting("v5e:1x1", 32768, 1)],
    ],
    "Llama 3.1 8B": [
        [Setting("v5e:2x2", 4096, 8, 4, accumulate=2), Setting("v5e:2x4", 4096, 8, 8)],
        [Setting("v5p:2x2x1", 4096, 16, accumulate=2)],
        [Setting("v6e:1x1", 4096, 8, accumulate=8), Setting("v6e:2x2", 4096, 8, 4, accumulate=2)],
    ],
    "Llama 3.1 70B": [
        [Setting("v5e:4x8", 4096, 16, 8, 4, accumulate=2), Setting("v5e:4x8", 2048, 16, 8, 4, accumulate=2)],
        [Setting("v5p:2x2x1", 4096, 8, 4, accumulate=2), Setting("v5p:2x2x2", 4096, 8, 8)],
        [Setting("v6e:2x4", 4096, 8, 4, 2, accumulate=2), Setting("v6e:4x4", 4096, 16, 8, 2, accumulate=2)],
    ],
}
"""For each model and chip: what is tried, in this order, until one fits."""


def plan(model: str, setting: Setting) -> dict[str, Any]:
    """The costs of a step, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_tpu.LLAMAS[model]))
        flags = f"--model.path {folder} {COMMON} {setting.flags} {setting.batch_flags}".split()
        config = parse(["configs/instruct_llama.py", *flags])
        return step_costs(config, _tpu.slice_devices(setting.slice)).to_json()


def table(results: _tpu.Results) -> str:
    """Compute what is missing, and describe for each model and chip the first setting that fits."""
    rows = []
    for model, chips in SETTINGS.items():
        for settings in chips:
            for setting in settings:
                key = f"{model} on {setting.slice}: {setting.flags} {setting.batch_flags}"
                found = results.get(key, functools.partial(plan, model, setting), *CODE)
                if found is not None and found["fits"]:
                    rows.append(_row(model, setting, found))
                    break
    header = (
        "model",
        "slice",
        "rows",
        "flags",
        "GiB a chip",
        "ms a step",
        "tokens/s a chip",
        "MFU",
        "collectives, GiB",
    )
    return _tpu.markdown(header, rows)


def _row(model: str, setting: Setting, found: dict[str, Any]) -> list[str]:
    seconds, gib = found["estimated_seconds"], 2**30
    moved = [f"{kind} {size / gib:.1f}" for kind, size in found["collectives"].items() if size > 0.05 * gib]
    return [
        model,
        f"{setting.slice}, {found['devices']} chip" + ("s" if found["devices"] > 1 else ""),
        f"{setting.rows} × {setting.length}",
        f"`{setting.flags}`",
        f"{found['peak_bytes'] / gib:.1f} of {found['device_memory'] / gib:.0f}",
        f"{1e3 * seconds:,.0f}",
        f"{found['tokens'] / seconds / found['devices']:,.0f}",
        f"{found['estimated_mfu']:.0%}",
        ", ".join(moved) or "-",
    ]


def main() -> None:
    """Compute what is missing, print the table, and write it into its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="use what is kept, and compile nothing")
    args = parser.parse_args()
    found = table(_tpu.Results(FILE, stale=args.tables))
    print(found)
    _tpu.write_table("tpu.md", "plans", found)


if __name__ == "__main__":
    main()

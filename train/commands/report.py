"""The command that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from jlora.files.buckets import is_in_bucket, located
from train.config import ConfigError
from train.report.curves import COLOURS, picture
from train.report.page import page
from train.report.reading import read_runs

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN...]")]


def report(runs: Runs, out: Path = Path("report.html")) -> None:
    """Write a page that compares runs, finished or not: metrics, curves, configuration differences, plans.

    Args:
      runs: Run directories, at most 8.
      out: File to write: .html for a self-contained page, .png for a picture of curves and main metrics.
    """
    if not 1 <= len(runs) <= len(COLOURS):
        raise ConfigError(
            f"got {len(runs)} runs, expected 1 to {len(COLOURS)} run directories, such as runs/*; "
            "pass them as `python -m train report RUN [RUN...]`"
        )
    if out.suffix not in (".html", ".png"):
        raise ConfigError(f"got --out {out}, expected a file whose name ends in .html or .png")
    found, out = read_runs(runs), located(out)
    if not is_in_bucket(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        out.write_bytes(picture(found))
    else:
        out.write_text(page(found), encoding="utf-8")
    print(f"written to {out}")

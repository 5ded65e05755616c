"""The command that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from train.config import ConfigError
from train.report.curves import COLOURS, picture
from train.report.page import page
from train.report.reading import read_runs

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN...]")]


def report(runs: Runs, out: Path = Path("report.html")) -> None:
    """Write a page that compares runs, finished or not: metrics, curves, differences in their configurations, plans.

    Args:
      runs: run directories, 8 at most.
      out: the file to write: .html for the page, which needs no other file and no network, or .png for a picture of the
        curves and the main metrics.
    """
    if not 1 <= len(runs) <= len(COLOURS):
        raise ConfigError(
            f"report: got {len(runs)} runs, expected 1 to {len(COLOURS)} run directories, such as runs/*; "
            "pass them as `python -m train report RUN [RUN...]`"
        )
    if out.suffix not in (".html", ".png"):
        raise ConfigError(f"report: got --out {out}, expected a file whose name ends in .html or .png")
    _check_matplotlib()
    found = read_runs(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        out.write_bytes(picture(found))
    else:
        out.write_text(page(found), encoding="utf-8")
    print(f"written to {out}")


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'report: curves need matplotlib ({error}); run: pip install -e ".[plots]"') from error

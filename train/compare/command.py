"""The command: the page or the picture of several runs, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jinja2
import tyro

from train.compare.drawing import COLOURS, LINES, picture, svg
from train.compare.figures import differing_fields, figure_tables, plans
from train.compare.reading import RunFiles, read_runs
from train.config import ConfigError

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN...]")]


def report(runs: Runs, out: Path = Path("report.html")) -> None:
    """Write a page that compares runs, finished or not: figures, curves, what differs in their configurations, plans.

    Args:
      runs: run directories, 8 at most.
      out: the file to write: .html for the page, which needs no other file and no network, or .png for a picture of the
        curves and the main figures.
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


def page(runs: Sequence[RunFiles]) -> str:
    """The page, in HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        heads=list(zip([run.name for run in runs], COLOURS, LINES, strict=False)),
        tables=figure_tables(runs),
        curves=svg(runs),
        fields=differing_fields(runs),
        plans=plans(runs),
    )


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'report: curves need matplotlib ({error}); run: pip install -e ".[plots]"') from error

"""The page of ``python -m train report``, rendered from the template `page.html`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from train.report.curves import COLOURS, LINES, svg
from train.report.reading import ReportedRun
from train.report.tables import differing_fields, metric_tables, plans


def page(runs: Sequence[ReportedRun]) -> str:
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
        tables=metric_tables(runs),
        curves=svg(runs),
        fields=differing_fields(runs),
        plans=plans(runs),
    )

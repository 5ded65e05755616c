"""The command that measures a run."""

from __future__ import annotations

from collections.abc import Mapping

from jlora._src.paths import bullets
from train.commands.inputs import RunPath
from train.compute.layouts import Jit
from train.config import ConfigError
from train.data import tables
from train.data.batches import Examples, cut_of
from train.data.cuts import line
from train.job import bucket_lengths
from train.loop.evaluate import make_measure
from train.networks.network import check_tokens
from train.report import console
from train.rundir.changes import data_changes
from train.rundir.directory import RunDirectory
from train.rundir.finished import FinishedRun, open_run
from train.tasks.base import Task


def evaluate(run: RunPath, source: str | None = None, limit: int | None = None) -> None:
    """Print the metrics of the adapted model on validation examples.

    Args:
      run: a run directory.
      source: other examples than the run's own validation examples: a file, a folder or a dataset's name.
      limit: use so many, the first ones.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"eval: got --limit {limit}, expected a whole number >= 1")
    opened = open_run(run)
    config = opened.config
    if source is None:
        table = tables.load(config.data, config.cache_dir)["validation"]
    else:
        table = tables.read(source, config.cache_dir, "source", quoted_tsv=config.data.quoted_tsv)
    table = table if limit is None else table.keep(range(min(limit, len(table))), f"beyond the limit of {limit:,}")
    sets = {name or "validation": examples for name, examples in opened.task.encode(table).items()}
    if table.provenance is not None:
        print(table.provenance.line())
        if source is None and (
            differing := data_changes(RunDirectory(run), {"validation": table.provenance.to_json()})
        ):
            print(f"these are not the examples of the run:{bullets(differing)}")
    for name, examples in sets.items():
        if (cut := cut_of(examples)) is not None and cut.cut + cut.dropped:
            print(line(name, cut, trains=False))
    for name, metrics in measured(opened, sets).items():
        print(f"{name}: {console.metrics_line(metrics)}")


def measured(run: FinishedRun, sets: Mapping[str, Examples]) -> dict[str, dict[str, float]]:
    """The adapted model's metrics on sets of examples, by their names."""
    task: Task = run.task
    check_tokens(run.network, sets)
    measure = make_measure(
        Jit(), run.network.forward, task, run.config.eval_batch_size, bucket_lengths(run.config, sets)
    )
    return {name: task.metrics(measure(run.params, run.adapters, examples)) for name, examples in sets.items()}

"""The command that evaluates a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jlora.messages import bullets
from train.commands.inputs import RunPath
from train.compute.compilation_cache import compilation_cache
from train.compute.layouts import one_device
from train.config import ConfigError
from train.data import tables
from train.data.batches import truncation_of
from train.data.ragged import Examples
from train.data.tables import Table
from train.job import bucket_lengths, encoded_table
from train.loop.evaluate import make_measure
from train.networks.network import check_tokens
from train.report import console
from train.rundir.changes import data_changes
from train.rundir.directory import RunDirectory
from train.rundir.finished import FinishedRun, open_run
from train.tasks.base import Task


def evaluate(run: RunPath, source: str | None = None, limit: int | None = None) -> None:
    """Print the adapted model's metrics on validation examples.

    Args:
      run: Run directory.
      source: File, folder or dataset to evaluate on. Default: the run's own validation examples.
      limit: Maximum number of examples, the first ones.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"got --limit {limit}, expected a whole number >= 1")
    opened = open_run(run)
    table = _table(opened, source)
    if limit is not None:
        table = table.keep(range(min(limit, len(table))), f"beyond the limit of {limit:,}")
    try:
        encoded = encoded_table(opened.task, table, opened.config.cache_dir)
    except ConfigError as error:
        if source is None:
            raise
        raise ConfigError(
            f"{error}\n`eval` takes no flags of the task: it reads the columns and labels that {opened.folder} was "
            f"trained on. Rename them in {source}"
        ) from error
    sets = {name or "validation": examples for name, examples in encoded.items()}
    _print_source(run, table, own=source is None)
    for name, examples in sets.items():
        if (cut := truncation_of(examples)) is not None and cut.cut + cut.dropped:
            print(cut.describe(name, training=False))
    for name, metrics in measured(opened, sets).items():
        print(f"{name}: {console.metrics_line(metrics)}")


def measured(run: FinishedRun, sets: Mapping[str, Examples]) -> dict[str, dict[str, float]]:
    """The adapted model's metrics on sets of examples, by their names."""
    task: Task = run.task
    check_tokens(run.network, sets)
    measure = make_measure(
        one_device(), run.network.forward, task, run.config.eval_batch_size, bucket_lengths(run.config, sets)
    )
    with compilation_cache(run.config):
        found = {name: measure(run.params, run.adapters, examples) for name, examples in sets.items()}
    return {name: task.metrics(one) for name, one in found.items()}


def _table(run: FinishedRun, source: str | None) -> Table:
    config = run.config
    if source is None:
        return tables.load(config.data, config.cache_dir)["validation"]
    return tables.read(source, config.cache_dir, "source", quoted_tsv=config.data.quoted_tsv)


def _print_source(run: Path, table: Table, *, own: bool) -> None:
    """Print the examples' origin, and whether the run's own have changed since."""
    if table.provenance is None:
        return
    print(table.provenance.describe())
    if own and (differing := data_changes(RunDirectory(run), {"validation": table.provenance.to_json()})):
        print(f"these are not the run's examples:{bullets(differing)}")

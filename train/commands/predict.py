"""The command that labels texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from scipy.special import softmax

import jlora
from train.commands.inputs import RunPath, read_inputs, text_of
from train.commands.results import check_new, write_results
from train.compute.compilation_cache import compilation_cache
from train.config import ConfigError
from train.data.batches import batch_of, ordered_rows, truncation_of
from train.job import bucket_lengths
from train.networks.network import check_tokens
from train.rundir.finished import FinishedRun, open_run
from train.tasks.classify import TextRegression, Texts

BATCH_SIZE = 64

_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


def predict(
    run: RunPath,
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    file: Path | None = None,
    column: str | None = None,
    out: Path | None = None,
) -> None:
    """Print each text with its predicted label and the label's probability, separated by tabs.

    Args:
      run: Run directory.
      text: Text to label. A pair of texts is separated by a tab.
      file: File of texts: .txt with one text per line, a table (jsonl, json, csv, tsv, parquet), or - for the lines
        of standard input. Blank lines keep their place in the output.
      column: Column of a table. Default: the run's column of texts.
      out: Write to this new .jsonl file instead: text, label, its probability, the probabilities of all
        labels, and row (from 1), in the order of the input.
    """
    check_new(out)
    opened = open_run(run)
    task = opened.task
    if not isinstance(task, Texts):
        raise ConfigError(f"{opened.folder} was not trained to label texts; see `generate` and `eval`")
    columns = [one for one in (column or task.config.text, task.config.pair) if one is not None]
    inputs = read_inputs(text, file, columns, opened.config, flag="--text", by_column=column is not None)
    rows = [
        None if row is None else [text_of(one, inputs.where(i)) for one in row] for i, row in enumerate(inputs.rows)
    ]
    records = _records(task, rows, outputs(opened, task, [row for row in rows if row is not None]))
    if out is not None:
        write_results(out, records)
        return
    for record in records:
        print(_line(record))


def outputs(run: FinishedRun, task: Texts, rows: list[list[str]]) -> np.ndarray:
    """The adapted model's outputs for each text or pair of texts, float32 [n, labels]."""
    first, *second = (list(column) for column in zip(*rows, strict=True))
    examples = task.tokens(first, second[0] if second else None)
    check_tokens(run.network, {"": examples})
    if (cut := truncation_of(examples)) is not None and cut.cut:
        print(cut.describe("predict", training=False), file=sys.stderr)  # the results may go to a pipe
    forward = jax.jit(lambda tree, inputs: jlora.lora(run.network.forward)(tree, inputs))
    found = np.empty((len(rows), max(len(task.labels), 1)), np.float32)
    buckets = bucket_lengths(run.config, {"": examples})
    with compilation_cache(run.config):
        for batch, own in ordered_rows(examples, min(len(rows), BATCH_SIZE)):
            answers = forward(run.tree, task.inputs(batch_of(examples, batch, buckets)))
            found[batch[:own]] = np.asarray(answers, np.float32)[:own]
    return found


def _records(task: Texts, rows: Sequence[list[str] | None], scores: np.ndarray) -> list[dict[str, Any]]:
    """The result of each row; ``scores`` are those of the nonblank rows."""
    names = ("text",) if task.config.pair is None else ("text", "pair")
    answers = iter([_answer(task, one) for one in scores])
    blank = dict.fromkeys(_answer(task, scores[0]))
    return [
        dict(zip(names, row or [""] * len(names), strict=True))
        | (blank if row is None else next(answers))
        | {"row": i + 1}
        for i, row in enumerate(rows)
    ]


def _answer(task: Texts, scores: np.ndarray) -> dict[str, Any]:
    if isinstance(task, TextRegression):
        return {"label": float(scores[0])}
    each = softmax(scores)
    return {
        "label": task.labels[scores.argmax()],
        "probability": float(each.max()),
        "probabilities": dict(zip(task.labels, each.tolist(), strict=True)),
    }


def _line(record: dict[str, Any]) -> str:
    """A text's record on one line, with line breaks escaped; empty for a blank text."""
    if record["label"] is None:
        return ""
    shown = [one for name, one in record.items() if name not in ("probabilities", "row")]
    cells = [f"{one:.4f}" if isinstance(one, float) else one for one in shown]
    return "\t".join(one.translate(_ESCAPES) for one in cells)

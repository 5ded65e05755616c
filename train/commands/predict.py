"""The command that labels texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from scipy.special import softmax

import jlora
from train.commands.inputs import RunPath, read_inputs, text_of
from train.commands.results import check_new, write_results
from train.config import ConfigError
from train.data.batches import batch_of, ordered_rows, truncation_of
from train.job import bucket_lengths
from train.networks.network import check_tokens
from train.rundir.finished import FinishedRun, open_run
from train.tasks.classify import TextRegression, Texts

_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


def predict(
    run: RunPath,
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    file: Path | None = None,
    column: str | None = None,
    out: Path | None = None,
) -> None:
    """Print each text with the label that the adapted model gives it and the label's probability, separated by tabs.

    Args:
      run: a run directory.
      text: a text; give the flag several times for several. A pair of texts is separated by a tab.
      file: a file of texts instead: .txt with one on each line, a table (jsonl, json, csv, tsv, parquet), or - for
        the lines of the standard input. Blank lines keep their place.
      column: of a table, by default the run's column of texts.
      out: write a new .jsonl file instead: text, label, probability and row (from 1), in the order of the input.
    """
    check_new(out)
    opened = open_run(run)
    task = opened.task
    if not isinstance(task, Texts):
        raise ConfigError(f"predict: {run} was not trained on texts to be labelled; see `generate` and `eval`")
    names = ("text",) if task.config.pair is None else ("text", "pair")
    columns = [one for one in (column or task.config.text, task.config.pair) if one is not None]
    try:
        inputs = read_inputs(text, file, columns, opened.config, flag="--text", chosen=column is not None)
        rows = [
            None if row is None else [text_of(one, inputs.where(i)) for one in row] for i, row in enumerate(inputs.rows)
        ]
    except ConfigError as error:
        raise ConfigError(f"predict: {error}") from error
    found = outputs(opened, task, [row for row in rows if row is not None])
    answers = dict(zip(inputs.asked, (_answer(task, scores) for scores in found), strict=True))
    blank = dict.fromkeys(next(iter(answers.values())))
    records = [
        dict(zip(names, row or [""] * len(names), strict=True)) | answers.get(i, blank) | {"row": i + 1}
        for i, row in enumerate(rows)
    ]
    if out is not None:
        write_results(out, records)
        return
    for record in records:
        print(_line(record))


def _answer(task: Texts, scores: np.ndarray) -> dict[str, Any]:
    if isinstance(task, TextRegression):
        return {"label": float(scores[0])}
    return {"label": task.labels[scores.argmax()], "probability": float(softmax(scores).max())}


def _line(record: dict[str, Any]) -> str:
    """One line for each text, whatever is in it; an empty one for a blank text."""
    if record["label"] is None:
        return ""
    shown = [f"{one:.4f}" if isinstance(one, float) else one for name, one in record.items() if name != "row"]
    return "\t".join(one.translate(_ESCAPES) for one in shown)


def outputs(opened: FinishedRun, task: Texts, rows: list[list[str]]) -> np.ndarray:
    """The adapted model's outputs for each text or pair of texts, float32 [n, labels]."""
    first, *second = (list(column) for column in zip(*rows, strict=True))
    examples = task.tokens(first, second[0] if second else None)
    check_tokens(opened.network, {"": examples})
    if (cut := truncation_of(examples)) is not None and cut.cut:
        print(cut.describe("predict", training=False), file=sys.stderr)  # beside the results, which may go to a pipe
    forward = jax.jit(lambda tree, inputs: jlora.lora(opened.network.forward)(tree, inputs))
    found = np.empty((len(rows), max(len(task.labels), 1)), np.float32)
    buckets = bucket_lengths(opened.config, {"": examples})
    for batch, own in ordered_rows(examples, min(len(rows), 64)):
        answers = forward(opened.tree, task.inputs(batch_of(examples, batch, buckets)))
        found[batch[:own]] = np.asarray(answers, np.float32)[:own]
    return found

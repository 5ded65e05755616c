"""`python -m train merge`: adapters of runs combined to a run directory that the other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora
from tests.messages import expect
from tests.runs import content, program
from tests.tiny import sentiment_flags, write_sentiment
from train.rundir.finished import open_run


@pytest.mark.slow
def test_a_merged_run_is_a_run(tmp_path: Path) -> None:
    """Two runs of one seed on one base, one with another learning rate, and one with another head."""
    runs = [tmp_path / name for name in ("one", "two", "other")]
    flags = ("--learning-rate 1e-3", "--learning-rate 3e-3", "--seed 5")
    write_sentiment(tmp_path)
    for run, own in zip(runs, flags, strict=True):
        code, text = program(
            *sentiment_flags(tmp_path, run, own, "--fit.epochs 1", f"--data.validation {tmp_path}/validation.jsonl")
        )
        assert code == 0, text
    out = tmp_path / "both"
    code, text = program("merge", str(runs[0]), str(runs[1]), "--weights", "0.25,0.75", "--out", str(out))
    assert code == 0, text
    expect(text, "cat of 0.25 x", "0.75 x", f"python -m train eval {out}")
    one, two, both = (open_run(run) for run in (*runs[:2], out))
    tree = jlora.merge(both.params, both.adapters)
    parts = [jlora.merge(run.params, run.adapters) for run in (one, two)]
    mean = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, *parts)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), tree, mean)
    assert json.loads((out / "summary.json").read_text())["merged"]["weights"] == [0.25, 0.75]
    for command in (
        ["eval", str(out)],
        ["predict", str(out), "--text", "good"],
        ["export", str(out), "--to", "peft"],
        ["report", str(out), str(runs[0]), "--out", str(tmp_path / "report.html")],
    ):
        code, text = program(*command)
        assert code == 0, text
    before = content(out)
    code, text = program("merge", str(runs[0]), str(runs[2]), "--out", str(tmp_path / "no"))
    assert code == 2 and not (tmp_path / "no").exists()
    expect(text, "the base's params/classifier/kernel", "--seed")
    again = ["merge", str(runs[0]), str(runs[1]), "--out", str(out)]
    for wrong, why in (
        (again, "already exists"),
        ([*again[:3], "--weights", "1"], "1 weights for 2 runs"),
        ([*again[:3], "--weights", "a,b"], "expected numbers"),
        ([*again[:3], "--method", "ties", "--out", str(tmp_path / "no")], "needs density"),
    ):
        code, text = program(*wrong)
        assert code == 2 and why in text, text
    assert content(out) == before

"""How the members of a sweep ended: ranking, table, summary, picture."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.sweep.picture import draw_sweep
from train.sweep.results import Result, ranked, sweep_summary, sweep_table, winners

VALUES: dict[str, list[Any]] = {
    "data": ["x/acme.csv", "x/bolt.csv", "x/core.csv"],
    "rank": [4, 8, 16],
    "lr": [1e-4, 1e-3, 1e-2],
    "dropout": [0.0, 0.1],
    "seed": [0, 1],
}


def make(*fields: str, seed: int = 0, lost: float = 0.3) -> list[Result]:
    """Members of a sweep over these fields, some without a metric, some with equal ones."""
    rng, results = random.Random(seed), []
    for combination in itertools.product(*(VALUES[name] for name in fields)):
        values = dict(zip(fields, combination, strict=True))
        metric = None if rng.random() < lost else rng.randint(0, 8) / 8
        status = "diverged in step 7" if metric is None else rng.choice(["finished", "dropped: 2 of 4 were better"])
        name = f"m{len(results)}"
        results.append(Result(name, values, status, 1000 + len(results), metric, rng.random(), f"members/{name}"))
    return results


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_comes_first_and_equal_ones_keep_their_order(seed, higher):
    results = make("rank", "lr", "dropout", "seed", seed=seed)
    found = ranked(results, higher)
    assert sorted(results, key=results.index) == sorted(found, key=results.index)
    for one, after in itertools.pairwise(found):
        if one.metric is None:
            assert after.metric is None and results.index(one) < results.index(after)
        elif one.metric == after.metric:
            assert results.index(one) < results.index(after)
        elif after.metric is not None:
            assert (one.metric > after.metric) == higher
    best = max if higher else min
    metrics = [one.metric for one in results if one.metric is not None]
    assert [one.metric for one in winners(results, higher)] == [best(metrics)]


def test_a_metric_that_is_not_finite_is_none():
    """And the JSON is valid, and gives the same result."""
    one = Result("rank4", {"rank": 4}, "diverged in step 3", 3, math.nan, math.inf, None)
    assert one.metric is None and one.loss is None
    for result in (one, *make("data", "lr")):
        assert Result.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))) == result


def test_each_data_set_has_its_best():
    """And a data set without a metric has none."""
    results = [one for one in make("data", "rank", "seed", lost=0.2) if one.values["data"] != "x/core.csv"]
    results += [Result("c", {"data": "x/core.csv", "rank": 4, "seed": 0}, "diverged in step 1", 1, None, None, None)]
    best = winners(results, True)
    assert [one.values["data"] for one in best] == ["x/acme.csv", "x/bolt.csv"]
    for one in best:
        of_data = [other.metric or 0 for other in results if other.values["data"] == one.values["data"]]
        assert one.metric == max(of_data)


def test_the_summary_names_the_best():
    results = make("rank", "lr")
    summary = sweep_summary(results, "accuracy", True, 12.344, ended="all")
    best = winners(results, True)[0]
    assert (summary["best"], summary["best_run_dir"]) == (best.name, best.run_dir)
    assert (summary["kind"], summary["primary_metric"], summary["ended"]) == ("sweep", "accuracy", "all")
    assert summary["seconds"] == 12.34
    assert [Result.from_json(one) for one in json.loads(json.dumps(summary, allow_nan=False))["members"]] == results
    none = sweep_summary(make("rank", lost=1), "accuracy", True, 1.0)
    assert none["best"] is None and none["best_run_dir"] is None and "best_of_data" not in none
    several = sweep_summary(make("data", "rank", lost=0), "loss", False, 1.0)
    assert several["best"] is None and list(several["best_of_data"]) == VALUES["data"]


def test_the_table_has_a_row_for_each_member_best_first():
    results = make("rank", "lr", "seed")
    header, _, *rows = sweep_table(results, "accuracy", True).splitlines()
    assert header.split() == ["rank", "lr", "seed", "accuracy", "last", "loss", "steps", "ended"]
    for one, row in zip(ranked(results, True), rows, strict=True):
        best = one == winners(results, True)[0]
        metric = "-" if one.metric is None else f"{one.metric:.4f}"
        rank, lr, seed = one.values.values()
        cells = [*["*"][:best], str(rank), str(lr), str(seed), metric, f"{one.loss:.4f}", f"{one.steps:,}"]
        assert row.split() == [*cells, *one.status.split()]


def test_the_table_keeps_the_members_of_a_data_set_together():
    rows = sweep_table(make("data", "lr", lost=0), "loss", False).splitlines()[2:]
    names = [next(word for word in row.split() if word in ("acme", "bolt", "core")) for row in rows]
    assert names == sorted(names) and [row[0] for row in rows] == ["*", " ", " "] * 3


def test_the_table_of_a_large_sweep_has_the_best_and_says_how_many_are_not_shown():
    results = make("rank", "lr", "dropout", "seed", lost=0.1) * 2
    *rows, last = sweep_table(results, "accuracy", True).splitlines()[2:]
    assert len(results) == 72 and len(rows) == 20 and last == "and 52 more members, in summary.json"
    assert rows[0].startswith("*") and not any(row.split()[4] == "-" for row in rows[1:])
    results = make("data", "rank", "lr", "seed", lost=0.1)
    *rows, last = sweep_table(results, "accuracy", True).splitlines()[2:]
    assert len(rows) == 3 and all(row.startswith("*") for row in rows) and last.startswith("and 51 more")


@pytest.mark.parametrize(
    ("fields", "panels"),
    [(("rank", "lr", "seed"), ["rank", "learning rate", "seed"]), (("data", "dropout"), ["data set", "dropout"])],
)
def test_the_picture_has_a_panel_for_each_field_and_a_mark_for_each_member(fields, panels, tmp_path, monkeypatch):
    """At their metrics and values; crosses for members without one; and a ring around the best."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *some, **more: (drawn.append(self), save(self, *some, **more)))
    results = make(*fields, seed=1)
    draw_sweep(tmp_path / "sweep.png", results, "accuracy", True)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    axes = [one for one in drawn[0].axes if one.get_xlabel()]
    assert [one.get_xlabel() for one in axes] == panels and axes[0].get_ylabel() == "accuracy"
    known = [one for one in results if one.metric is not None]
    for panel, field in zip(axes, fields, strict=True):
        places: dict[Any, list[tuple[float, float]]] = {
            found.get_label(): [(x, y) for x, y in np.asarray(found.get_offsets())] for found in panel.collections
        }
        dots = [*places.get("finished", []), *places["ended early"]]
        rings = places.get("best", [])
        assert sorted(y for _, y in dots) == sorted(one.metric or 0.0 for one in known)
        assert len(places["no metric"]) == len(results) - len(known)
        expected = winners(results, True) if field == "data" or "data" not in fields else []
        assert [y for _, y in rings] == [one.metric for one in expected]
        assert {*rings} <= {*dots}
        ticks = np.asarray(panel.get_xticks())
        nearest = [int(np.abs(ticks - x).argmin()) for x, _ in dots]
        values = [VALUES[field].index(one.values[field]) for one in known]
        assert sorted(zip(nearest, (y for _, y in dots), strict=True)) == sorted(
            zip(values, (one.metric or 0.0 for one in known), strict=True)
        )


def test_a_logarithmic_field_has_its_values_at_their_logarithms(tmp_path, monkeypatch):
    """And with a value of 0, at equal distances; all labels are there."""
    from matplotlib.figure import Figure

    ticks: list[Any] = []

    def look(self: Figure, *_: object, **__: object) -> None:
        panel = self.axes[0]
        ticks.append((list(panel.get_xticks()), [one.get_text() for one in panel.get_xticklabels()]))

    monkeypatch.setattr(Figure, "savefig", look)
    for values in ([1e-4, 1e-3, 0.1], [0.0, 1e-4, 0.1]):
        results = [Result(str(x), {"weight_decay": x}, "finished", 1, x, x, None) for x in reversed(values)]
        draft = tmp_path / "sweep.png"
        with pytest.raises(FileNotFoundError):  # nothing is written here
            draw_sweep(draft, results, "loss", False)
    assert ticks[0][0] == pytest.approx([-4, -3, -1]) and ticks[0][1] == ["1e-4", "1e-3", "0.1"]
    assert ticks[1][0] == pytest.approx([0, 1, 2]) and ticks[1][1] == ["0", "1e-4", "0.1"]


@pytest.mark.parametrize("results", [make("rank", lost=1), make("seed", lost=1)[:1], make("data", lost=0)[:1]])
def test_a_sweep_without_a_metric_or_with_one_member_has_a_table_and_a_picture_too(results, tmp_path: Path):
    draw_sweep(tmp_path / "sweep.png", results, "accuracy", True)
    assert (tmp_path / "sweep.png").stat().st_size
    assert len(sweep_table(results, "accuracy", True).splitlines()) == 2 + len(results)

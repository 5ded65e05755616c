"""The page that compares runs, on run directories written by hand."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import tyro

from tests.messages import expect, message
from train.__main__ import main
from train.commands.report import report
from train.config import ConfigError
from train.report.curves import COLOURS

TEXTS = {"kind": "SequenceClassification", "text": "sentence", "regression": False}
CHAT = {"kind": "CausalLM", "messages": "messages"}
PLAN = "weight  adapter\nlayer_0/query/kernel  r=8\n"


def config(**changes: Any) -> dict[str, Any]:
    lora = {"rank": 8, "alpha": 16.0, "targets": "all-linear"}
    rest = {"mode": "lora", "seed": 0, "fit": {"kind": "FitConfig", "epochs": 2}}
    return {"kind": "TrainConfig", "name": "toy", "task": TEXTS, "lora": lora, **rest} | changes


def records(metric: str = "accuracy", **changes: float) -> list[dict[str, Any]]:
    """The training of a base, and two epochs of five steps with a record for each step."""
    found: list[dict[str, Any]] = [{"phase": "base", "step": 1, "loss": 9.0, "epoch": 1, "seconds": 1.0}]
    for step in range(1, 11):
        speed = {"step_seconds": 0.01, "examples_per_second": 100.0, "tokens_per_second": 6400.0, "mfu": 0.2}
        line = {"phase": "fit", "step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-3 / step} | speed
        found.append(line | changes)
        if step % 5 == 0:
            found.append(found[-1] | {"epoch": step // 5, "seconds": 1.0, f"validation_{metric}": 0.05 * step})
    return found


def summary(adapted: float, metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    metrics = {"base": {"validation": {metric: 0.125}}, "adapted": {"validation": {metric: adapted, "f1": 0.25}}}
    return {"primary": metric, "metrics": metrics, "trainable": 1234, "total": 56789, "seconds": 3723.4} | changes


def write(
    folder: Path, config: Any, records: list[dict[str, Any]], summary: Any = None, plan: str | None = PLAN
) -> Path:
    """A run directory; without a summary it is unfinished."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if plan is not None:
        (folder / "plan.txt").write_text(plan)
    return folder


def write_two(folder: Path) -> tuple[Path, ...]:
    """Two runs which differ in the rank and the seed."""
    one = write(folder / "one", config(), records(), summary(0.8125))
    lora = {"rank": 16, "alpha": 16.0, "targets": "all-linear"}
    return one, write(folder / "other", config(lora=lora, seed=3), records(), summary(0.6875))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, ...]:
    return write_two(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the two runs."""
    return page(*write_two(tmp_path_factory.mktemp("two")))


def page(*runs: Path) -> str:
    out = runs[0].parent / "report.html"
    report(runs, out)
    return out.read_text(encoding="utf-8")


def text(html: str) -> str:
    """The visible text, without the curves."""
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", html, flags=re.S)).split())


def titles(html: str) -> list[str]:
    """The titles of the curves' panels."""
    found = re.findall(r"<text[^>]*>([a-z][^<]*)</text>", html)
    return [title for title in found if title != "step"]


def lines(html: str, colour: str) -> list[str]:
    """The curves in this colour that have more than one point."""
    return re.findall(rf'<path d="M[^"]*L[^"]*" [^>]*stroke: {colour}', html)


# The page


def test_a_page_shows_every_run_and_its_metrics(runs, capsys):
    html = page(*runs)
    expect(text(html), "2 runs compared", "one", "other", "0.8125", "0.6875", "0.1250", "validation, f1", "0.2500")
    expect(text(html), "1,234 of 56,789 (2.17%)", "1:02:03", "finished")
    assert capsys.readouterr().out == f"written to {runs[0].parent / 'report.html'}\n"


def test_only_fields_that_differ_are_shown(html):
    shown = text(html).split("Differences between the configurations")[1].split("Adapted weights")[0]
    expect(shown, "lora.rank 8 16", "seed 0 3")
    assert not [name for name in ("lora.alpha", "lora.targets", "task", "mode", "fit.epochs", "kind") if name in shown]


def test_how_a_run_is_computed_is_a_difference_and_where_it_is_kept_is_not(tmp_path):
    def aside(name: str, every: int) -> dict[str, Any]:
        save = {"kind": "SaveConfig", "every_steps": every}
        return {"run_dir": name, "cache_dir": name, "log": [name], "resume": every, "processes": None, "save": save}

    one = config(**aside("a", 1), compute={"kind": "ComputeConfig", "layout": "jit", "rules": {}})
    other = config(**aside("b", 2), compute={"kind": "ComputeConfig", "layout": "mesh", "rules": {"lm_head/*": "fsdp"}})
    folders = [write(tmp_path / c["run_dir"], c, records(), summary(0.5)) for c in (one, other)]
    shown = text(page(*folders)).split("Differences between the configurations")[1].split("Adapted weights")[0]
    rows = "compute.layout jit mesh compute.rules {} – compute.rules.lm_head/* – fsdp"
    assert shown.strip().endswith(f"a b {rows}")


def test_a_field_that_a_run_lacks_and_another_kind_are_differences(tmp_path):
    one = write(tmp_path / "one", config(), records(), summary(0.5))
    other = write(tmp_path / "other", config(task=CHAT), records("loss"), summary(0.5, "loss"))
    shown = text(page(one, other))
    expect(shown, "task SequenceClassification CausalLM task.text sentence – task.regression False – task.messages –")


def test_equal_configurations_are_reported_as_equal(tmp_path):
    folders = [write(tmp_path / name, config(run_dir=name), records(), summary(0.5)) for name in ("one", "other")]
    expect(text(page(*folders)), "the runs have the same configuration")
    assert "Differences between" not in text(page(folders[0]))


def test_every_run_has_one_line_in_every_panel(html):
    assert titles(html) == ["training loss", "validation accuracy", "learning rate", "tokens per second"]
    assert [len(lines(html, colour)) for colour in COLOURS[:3]] == [4, 4, 0]


def test_the_base_is_not_among_the_curves(tmp_path):
    folder = write(tmp_path / "run", config(), records(), summary(0.5))
    before = page(folder)
    kept = [record for record in records() if record["phase"] == "fit"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert page(folder) == before


def test_a_page_needs_nothing_beside_it(html):
    assert set(re.findall(r'[\w:]+="https?://[^"]*"', html)) == {
        'xmlns:xlink="http://www.w3.org/1999/xlink"',
        'xmlns="http://www.w3.org/2000/svg"',
    }
    assert len(re.findall("https?://", html)) == 2
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', html))
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\((?!#)", html)


def test_text_is_shown_as_it_is(tmp_path):
    folder = write(tmp_path / "<b>&$x^2$", config(), records(), summary(0.5, name="<i>"), "<script>alert(1)</script>")
    other = write(tmp_path / "_other", config(name="<u>"), records(), summary(0.5))
    html = page(folder, other)
    assert not re.search(r"<script|<b>|<i>|<u>", html)
    expect(html, "&lt;b&gt;&amp;$x^2$", "&lt;u&gt;", "&lt;script&gt;alert(1)&lt;/script&gt;")
    report((folder, other), tmp_path / "report.png")


def test_plans_are_shown_once_for_all_runs_that_share_them(tmp_path):
    folders = [
        write(tmp_path / name, config(), records(), summary(0.5), plan)
        for name, plan in (("one", PLAN), ("two", PLAN), ("three", "another plan"), ("old", None))
    ]
    html = page(*folders)
    assert re.findall(r"<summary>(.*?)</summary>", html) == ["one, two", "three"]
    expect(html, f"<pre>{PLAN.strip()}</pre>", "<pre>another plan</pre>")
    assert "Adapted weights" not in page(folders[-1])


def test_parents_distinguish_runs_of_the_same_name(tmp_path):
    folders = [
        write(tmp_path / name, config(), records(), summary(0.5)) for name in ("a/x/run", "b/x/run", "b/y/run", "mine")
    ]
    assert re.findall(r"</span>(.+?)</li>", page(*folders)) == ["a/x/run", "b/x/run", "y/run", "mine"]


def test_the_page_depends_on_the_runs_alone(runs, html):
    """Not on the time or their location; a folder that is given twice counts once."""
    assert page(*runs, runs[0], runs[0].parent / "other" / ".." / "one") == html


# Runs that lack something


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    begun = write(tmp_path / "begun", config(), [])
    early = write(tmp_path / "early", config(), records()[:4])
    later = write(tmp_path / "later", config(), records()[:8])
    shown = text(page(begun, early, later))
    expect(shown, "unfinished, step 0 of ?", "unfinished, step 3 of ?", "unfinished, step 6 of 10", "0.2500 at step 5")
    expect(text(page(begun)), "Nothing has been logged yet")
    (begun / "metrics.jsonl").unlink()
    report((begun,), tmp_path / "report.png")


def test_the_training_time_is_that_of_all_parts_of_a_run(tmp_path):
    """``seconds`` is the time of the last part of a run that was resumed. Examples are counted as they were used."""
    data = {"train": {"used": 7200}, "validation": {"used": 81}}
    run = write(tmp_path / "run", config(), records(), summary(0.5, training_seconds=7384.0, data=data))
    shown = text(page(run))
    expect(shown, "training time, h:mm:ss", "2:03:04", "training examples", "7,200", "validation examples", "81")
    assert "1:02:03" not in shown


def test_whole_numbers_are_shown_alike(tmp_path):
    """A flag makes a float of what a config file has as an integer."""
    of = [write(tmp_path / str(alpha), config(lora={"alpha": alpha}), records()) for alpha in (16, 8.0, 0.5)]
    assert re.search(r"lora\.alpha\s+16\s+8\s+0\.5\s", text(page(*of)))


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = write(tmp_path / "run", config(), records()[:-3])
    before = page(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "fit", "step": 9, "lo')
    assert page(folder) == before


def test_runs_of_older_versions_are_shown_by_what_they_have(tmp_path):
    ends = [record for record in records() if "epoch" in record]
    old = [{name: one[name] for name in one if "second" not in name and name != "mfu"} for one in ends]
    html = page(write(tmp_path / "run", config(), old, summary(0.5, metrics=None, seconds=None), plan=None))
    assert titles(html) == ["training loss", "validation accuracy", "learning rate"]
    assert "speed" not in text(html)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_loss_of_any_value_can_be_drawn(tmp_path, value):
    some = records()
    some[3]["loss"] = value
    folders = [
        write(tmp_path / "some", config(), some, summary(value)),
        write(tmp_path / "all", config(), records(loss=value), summary(0.5)),
    ]
    for name in ("report.html", "report.png"):
        report(tuple(folders), tmp_path / name)


def test_runs_with_different_main_metrics_show_both(tmp_path):
    one = write(tmp_path / "one", config(), records(), summary(0.8125))
    other = write(tmp_path / "other", config(task=CHAT), records("loss"), summary(0.6875, "loss"))
    html = page(one, other)
    assert {"validation accuracy", "validation loss"} <= set(titles(html))
    expect(text(html), "validation, adapted 0.8125 –", "validation, adapted – 0.6875")


# The picture


def test_a_picture_is_a_png(tmp_path):
    folders = [write(tmp_path / f"run{i}", config(seed=i), records(), summary(0.5)) for i in range(len(COLOURS))]
    out = tmp_path / "new" / "picture.png"
    report(tuple(folders), out)
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# Errors


def test_the_command_line_takes_runs_and_a_file(runs, tmp_path, capsys):
    out = tmp_path / "mine.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    expect(text(out.read_text(encoding="utf-8")), "2 runs compared")
    assert capsys.readouterr().out == f"written to {out}\n"


def test_the_command_line_refuses_a_folder_that_is_not_a_run(tmp_path, capsys):
    out = tmp_path / "mine.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 2
    expect(
        capsys.readouterr().err, "error: report: 1 problem(s)", f"{tmp_path} is not a run directory", "no config.json"
    )
    assert not out.exists()


def test_the_help_shows_the_arguments(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["report", "--help"])
    expect(capsys.readouterr().out, "python -m train report", "RUN", "--out")


@pytest.mark.parametrize("count", [0, 9])
def test_between_1_and_8_runs_can_be_compared(tmp_path, count):
    argv = [str(tmp_path / f"run{i}") for i in range(count)]
    said = message(ConfigError, lambda: tyro.cli(report, args=argv))
    expect(said, f"got {count} runs", "expected 1 to 8", "python -m train report RUN")


def test_other_files_than_pages_and_pictures_are_refused(runs):
    expect(message(ConfigError, lambda: report(runs, Path("a.pdf"))), "--out a.pdf", ".html or .png")


def test_every_problem_is_listed_at_once(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "checkpoint", {"model_type": "bert"}, [])
    one, other = runs
    good = (one / "metrics.jsonl").read_text().splitlines(keepends=True)
    (one / "metrics.jsonl").write_text("".join([*good[:2], "{oops\n", *good[2:], '{"step": "3"}\n']))
    (other / "summary.json").write_text('{\n  "primary": accuracy\n}')
    said = message(ConfigError, lambda: page(*runs, tmp_path / "empty", tmp_path / "checkpoint", tmp_path / "none"))
    expect(said, "6 problem(s)", f"{one}/metrics.jsonl, line 3: got '{{oops'", f"line {len(good) + 2}: got", "delete")
    expect(said, f"{other}/summary.json", "line 2")
    expect(said, *(f"{tmp_path}/{name} is not a run directory: it has no config.json" for name in ("none", "empty")))
    expect(said, f"{tmp_path}/checkpoint is not a run directory: its config.json is of something else")
    assert not (tmp_path / "report.html").exists()

"""The writers log every number of every record once, at its step, and only those asked for are imported."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.messages import expect, message
from train.config import ConfigError
from train.report.writers import check, open_writers

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [
    {"phase": "base", "step": 5, "loss": 2.0, "learning_rate": 0.5},
    {"phase": "base", "step": 9, "epoch": 1, "loss": 1.5, "accuracy": 0.25, "seconds": 0.125},
    {"phase": "fit", "step": 4, "loss": 0.75, "learning_rate": 0.25},
    {"phase": "fit", "step": 8, "epoch": 1, "loss": 0.5, "accuracy": 0.75, "seconds": 0.5},
]
EXPECTED = {
    ("base/loss", 5, 2.0),
    ("base/learning_rate", 5, 0.5),
    ("base/loss", 9, 1.5),
    ("base/accuracy", 9, 0.25),
    ("base/seconds", 9, 0.125),
    ("fit/loss", 4, 0.75),
    ("fit/learning_rate", 4, 0.25),
    ("fit/loss", 8, 0.5),
    ("fit/accuracy", 8, 0.75),
    ("fit/seconds", 8, 0.5),
}


def test_without_names_nothing_is_imported_or_written(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from train.report.writers import check, open_writers\n"
        f"check(())\nwith open_writers((), Path({str(tmp_path)!r}), {{}}) as writers: writers.write({RECORDS[0]})\n"
        "assert not {'tensorboardX', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    check(())
    expect(message(ConfigError, lambda: check(["wandb"])), "wandb", "pip install -e '.[wandb]'")
    text = message(ConfigError, lambda: check(["tensorboard", "wandb"]))
    expect(text, "tensorboard needs the package tensorboardX", "pip install -e '.[tensorboard,wandb]'")


# TensorBoard


def events(folder: Path) -> Iterator[Any]:
    """The events of a folder as TensorBoard reads them, file by file: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]


def scalars(run_dir: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard shows of a run: the start of a session hides earlier events from its step on."""
    from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

    shown: list[tuple[str, int, float]] = []
    for folder in sorted((run_dir / "tensorboard").iterdir()):
        found: list[tuple[str, int, float]] = []
        for event in events(folder):
            if event.session_log.status == SessionLog.START:
                found = [one for one in found if one[1] < event.step]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        shown += found
    return shown


def test_tensorboard_has_every_number_of_every_record_at_its_step(tmp_path: Path) -> None:
    check(["tensorboard"])
    with open_writers(["tensorboard"], tmp_path, {}) as writers:
        for record in RECORDS:
            writers.write(record)
    assert set(scalars(tmp_path)) == EXPECTED
    assert len(scalars(tmp_path)) == len(EXPECTED)


def test_a_resumed_run_shows_no_step_twice_and_keeps_its_base(tmp_path: Path) -> None:
    """The killed process went on to step 8 of the fit after step 6 was saved; the base had more steps than that."""
    with open_writers(["tensorboard"], tmp_path, {}) as writers:
        for record in RECORDS:
            writers.write(record)
    with open_writers(["tensorboard"], tmp_path, {}, first_step=7) as writers:
        writers.write(RECORDS[-1] | {"seconds": 0.25})
    assert set(scalars(tmp_path)) == EXPECTED - {("fit/seconds", 8, 0.5)} | {("fit/seconds", 8, 0.25)}
    assert len(scalars(tmp_path)) == len(EXPECTED)


def test_values_that_are_not_finite_numbers_do_no_harm(tmp_path: Path) -> None:
    odd = {"phase": "fit", "step": 1, "loss": math.nan, "norm": math.inf, "accuracy": None, "name": "x", "count": 3}
    with open_writers(["tensorboard"], tmp_path, {}) as writers:
        writers.write(odd)
    found = {tag: value for tag, _, value in scalars(tmp_path)}
    assert math.isnan(found.pop("fit/loss"))
    assert found == {"fit/norm": math.inf, "fit/count": 3.0}


# Weights & Biases


class Recorder(ModuleType):
    """Stands in for the package wandb and its run, and records all calls."""

    class Error(Exception):
        """As wandb's own."""

    def __init__(self, refusal: str | None = None):
        super().__init__("wandb")
        self.refusal = refusal
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def init(self, **options: Any) -> Recorder:
        if self.refusal:
            raise self.Error(self.refusal)
        self.calls.append(("init", (), options))
        return self

    def define_metric(self, *args: Any, **options: Any) -> None:
        self.calls.append(("define_metric", args, options))

    def log(self, *args: Any, **options: Any) -> None:
        self.calls.append(("log", args, options))

    def finish(self, *args: Any, **options: Any) -> None:
        self.calls.append(("finish", args, options))

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for called, args, options in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


def test_wandb_has_every_number_of_every_record_over_the_steps_of_its_phase(wandb: Recorder, tmp_path: Path) -> None:
    check(["wandb"])
    with open_writers(["wandb"], tmp_path, {"seed": 0}) as writers:
        for record in RECORDS:
            writers.write(record)

    ((_, options),) = wandb.named("init")
    assert options["config"] == {"seed": 0}
    assert (options["project"], options["name"], options["dir"]) == ("jlora", tmp_path.name, str(tmp_path))
    axes = {args[0]: options.get("step_metric") for args, options in wandb.named("define_metric")}
    assert axes == {"base/step": None, "base/*": "base/step", "fit/step": None, "fit/*": "fit/step"}

    found = set()
    for (row,), options in wandb.named("log"):
        assert not options  # a step of wandb's own would have to rise
        ((axis, step),) = ((tag, value) for tag, value in row.items() if tag.endswith("/step"))
        found |= {(tag, step, value) for tag, value in row.items() if tag != axis}
    assert found == EXPECTED
    assert wandb.named("finish") == [((), {"exit_code": 0})]


def test_wandb_continues_a_resumed_run_and_no_other(wandb: Recorder, tmp_path: Path) -> None:
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    for run_dir, first_step in ((one, 1), (one, 7), (other, 1)):
        open_writers(["wandb"], run_dir, {}, first_step).close()
    first, resumed, another = (options for _, options in wandb.named("init"))
    assert first == resumed
    assert first["resume"] == "allow"
    assert first["id"] != another["id"]


def test_a_failed_run_is_marked_in_wandb(wandb: Recorder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError), open_writers(["wandb"], tmp_path, {}):
        raise ConfigError("the loss is nan")
    assert wandb.named("finish") == [((), {"exit_code": 1})]


def test_an_error_of_wandb_names_the_way_out(wandb: Recorder, tmp_path: Path) -> None:
    wandb.refusal = "No API key configured. Use `wandb login` to log in."
    text = message(ConfigError, lambda: open_writers(["wandb"], tmp_path, {}))
    expect(text, "wandb login", "WANDB_MODE=offline", str(tmp_path))


def test_both_writers_work_together(wandb: Recorder, tmp_path: Path) -> None:
    with open_writers(["tensorboard", "wandb"], tmp_path, {}) as writers:
        writers.write(RECORDS[0])
    assert len(scalars(tmp_path)) == 2
    assert len(wandb.named("log")) == 1

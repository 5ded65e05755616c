"""The learning rate: its schedules, and the flag that sets it."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax
import numpy as np
import optax
import pytest

from tests.runs import program
from train.__main__ import main, parse
from train.compute.optimizer import make_schedule
from train.config import FitConfig, LearningRates, Schedule

PEAK = 3e-3
STEPS = (1, 2, 3, 7, 20, 100)
WARMUPS = (0.0, 0.03, 0.1, 0.5, 0.9, 0.99)


def rates(name: Any, warmup: float, steps: int, peak: float = PEAK) -> np.ndarray:
    """Of every step, as the compiled step computes it, and after the last one."""
    schedule = make_schedule(FitConfig(schedule=name, warmup=warmup), peak, steps)
    return np.asarray(jax.jit(jax.vmap(lambda step: schedule(step) * np.float32(1)))(np.arange(steps + 1)))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_step_learns_and_the_peak_is_reached(name):
    """No step has a rate of 0, it rises in equal parts, and falls to where optax's schedules end."""
    for steps in STEPS:
        for warmup in WARMUPS:
            found, rise = rates(name, warmup, steps), round(warmup * steps)
            np.testing.assert_allclose(found[:rise], PEAK * np.arange(1, rise + 1) / max(rise, 1), rtol=1e-6)
            assert (found[:-1] > 0).all(), (steps, warmup)
            np.testing.assert_allclose([found.max(), found[max(rise - 1, 0)]], PEAK, rtol=1e-6)
            assert (np.diff(found[rise:]) <= 0).all()
            if rise < steps:
                rest: Any = {
                    "cosine": optax.cosine_decay_schedule(PEAK, steps - rise),
                    "linear": optax.linear_schedule(PEAK, 0.0, steps - rise),
                    "constant": optax.constant_schedule(PEAK),
                }[name]
                expected = [float(rest(step)) for step in range(steps - rise + 1)]
                np.testing.assert_allclose(found[rise:], expected, rtol=1e-5, atol=1e-9)


# The flag


@pytest.mark.parametrize("mode", ["lora", "full", "head"])
@pytest.mark.parametrize("flag", [["--learning-rate", "1e-4"], ["--learning-rate=1e-4"], ["--learning_rate", "1e-4"]])
def test_a_learning_rate_is_that_of_the_mode(mode, flag):
    """Wherever the mode stands; the others, and the base's, stay as the config file has them."""
    plain = parse(["--mode", mode])
    for argv in ([*flag, "--mode", mode], ["fit", "configs/digits.py", "--mode", mode, *flag, "--seed", "3"]):
        rates = parse(argv).learning_rate
        assert rates == dataclasses.replace(plain.learning_rate, **{mode: 1e-4})


def test_the_rates_of_other_modes_may_stand_beside_it():
    config = parse(["--learning-rate", "1e-4", "--learning-rate.base", "0.5", "--learning-rate.full", "0.25"])
    assert (config.mode, config.learning_rate) == ("lora", LearningRates(base=0.5, lora=1e-4, full=0.25, head=1e-2))


@pytest.mark.parametrize("own", [["--learning-rate.full", "0.1"], ["--learning_rate.full=0.1"]])
def test_a_mode_has_one_learning_rate(own):
    code, printed = program("--learning-rate", "1e-4", "--mode", "full", *own)
    assert (code, "got --learning-rate and --learning-rate.full" in printed) == (2, True), printed


@pytest.mark.parametrize("argv", [["--learning-rate"], ["--learning-rate", "1", "--learning-rate", "2"]])
def test_it_is_given_once_and_has_a_value(argv):
    code, printed = program(*argv)
    assert (code, "expected a number; pass --learning-rate 1e-4" in printed) == (2, True), printed


def test_what_is_no_learning_rate_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--learning-rate", "small"])
    assert error.value.code == 2
    assert "--learning-rate.lora" in capsys.readouterr().err
    code, printed = program("--learning-rate", "-1")
    assert (code, "learning_rate.lora: got -1.0, expected a number > 0" in printed) == (2, True), printed


def test_a_config_file_names_the_mode(tmp_path):
    """A number alone would be another mode's when --mode says so; the error shows what to write."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses, runpy\nconfig = runpy.run_path('configs/digits.py')['config']\n"
        "config = dataclasses.replace(config, learning_rate=1e-4)\n"
    )
    code, printed = program(str(file))
    assert code == 2
    assert "learning_rate: got 0.0001, expected a LearningRates; write learning_rate = LearningRates(" in printed


@pytest.mark.parametrize(
    "part", ["data", "lora", "fit", "learning_rate", "compute", "processes", "save", "task", "model"]
)
def test_a_part_of_another_kind_is_refused_whatever_flags_are_put_over_it(tmp_path, part):
    """The defaults of the part were taken silently, where it has some."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses, runpy\nconfig = runpy.run_path('configs/digits.py')['config']\n"
        f"config = dataclasses.replace(config, {part}=0.5)\n"
    )
    code, printed = program(str(file), "--seed", "1", "--data.limit", "0")
    assert (code, f"{part}: got 0.5, expected a " in printed) == (2, True), printed

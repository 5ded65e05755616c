"""The benchmark of methods at toy size: each starts at the base, and a stopped benchmark continues."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks import variants
from benchmarks._variants import METHODS
from train.__main__ import ROOT, parse
from train.job import training_data


@pytest.fixture(scope="module")
def problem() -> variants.Problem:
    """One epoch on 128 digits, on a random network."""
    toy = "--model.width 16 --model.depth 1 --model.heads 2 --model.hidden 32 --fit.epochs 1 --lora.rank 2"
    config = parse([str(ROOT / "configs" / "digits.py"), *toy.split()])
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, exclude=("head", "embed")))
    data = training_data(config)
    params = data.network.init(jax.random.key(0))
    rows = np.arange(160)
    return variants.Problem(
        config, data.network.forward, data.task, lambda _: params, data.examples, rows[:128], rows[128:],
        data.test["shifted"],
    )  # fmt: skip


@pytest.mark.slow
def test_every_method_starts_at_the_base(problem: variants.Problem) -> None:
    setting, batch = problem.setting(0), problem.batches(0)[0]
    expected = problem.predict(setting.params, batch)
    for name, method in METHODS.items():
        start = problem.start(method, setting, 0)
        merged = jlora.merge(jlora.dequantize(start.base), start.adapters(start.trained))
        error = float(jnp.abs(problem.predict(merged, batch) - expected).max())
        few_bits = any(isinstance(leaf, jlora.QuantizedArray) for leaf in jlora.named_leaves(start.base)[0].values())
        assert 0 < error < 0.5 if few_bits else error < 1e-4, (name, error)


@pytest.mark.slow
def test_a_stopped_benchmark_continues_with_equal_runs(problem: variants.Problem, monkeypatch) -> None:
    methods = ("LoRA", "VeRA", "NF4 base")
    monkeypatch.setattr(variants, "METHODS", {name: METHODS[name] for name in methods})
    monkeypatch.setitem(variants.RATES, "digits", (1e-3, 1e-2))
    runs: list = []
    written: list = []
    variants.run_all(problem, "digits", methods, runs, lambda: written.append(len(runs)))
    assert len(runs) == 3 * (2 + 1 + 1) and sum("test" in run for run in runs) == 3 * 3
    assert len(written) == len(runs) + 3 * 3  # kept after each run, and after each score on the test set
    again = [run for run in runs if run["method"] != "VeRA" or run["seed"] != 1]
    variants.run_all(problem, "digits", methods, again, lambda: None)
    assert sorted(map(_figures, again)) == sorted(map(_figures, runs))
    found = variants.costs(problem, methods, rounds=1)
    assert found["NF4 base"]["bytes"]["frozen"] < found["LoRA"]["bytes"]["frozen"]
    assert found["VeRA"]["bytes"]["trained"] < found["LoRA"]["bytes"]["trained"]


@pytest.mark.parametrize("page", variants.TABLES)
def test_pages_have_the_tables_that_are_kept(page: str) -> None:
    """Those that ``--tables`` writes."""
    table = variants.TABLES[page](json.loads(variants.FILE.read_text()))
    assert table in (ROOT / "docs" / page).read_text(), f"write the tables of docs/{page} with --tables"


def _figures(run: dict) -> str:
    return str({name: value for name, value in run.items() if name != "seconds"})


def test_a_rate_is_chosen_on_the_held_out_examples_of_the_first_seed() -> None:
    def run(rate: float, held_out: float, loss: float, test: float, seed: int = 0) -> dict:
        scores = {"held_out": {"accuracy": held_out, "loss": loss}, "test": {"accuracy": test, "loss": 0.0}}
        return {"method": "LoRA", "seed": seed, "rate": rate, **scores}

    runs = [run(1e-3, 0.9, 0.2, 0.7), run(1e-2, 0.9, float("nan"), 0.9), run(1e-1, 0.8, 0.1, 0.9)]
    assert variants.best_rate([*runs, run(1e-2, 1.0, 0.0, 1.0, seed=1)], "LoRA") == 1e-3

"""What people expect of a trainer, law by law: dtypes, rates, parts of a batch, speed, writers, progress."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import named_leaves, optim
from tests import tiny
from tests.runs import program, records
from train.__main__ import parse
from train.compute import flops, throughput
from train.compute.optimizer import make_optimizer
from train.compute.step import init_state, make_step
from train.config import FitConfig
from train.experiment import run
from train.loop.state import Averages, Intervals, StepCounts
from train.rundir.finished import open_run


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An encoder's checkpoint and sentences of many lengths."""
    return tiny.write_sentiment(tmp_path_factory.mktemp("trainer"))


def flags(work: Path, run_dir: Path, more: str = "") -> list[str]:
    return tiny.sentiment_flags(work, run_dir, "--learning-rate.lora 0.01 --fit.epochs 2", more)


# The step, on a model with counts of its own


class Rows:
    """A task whose loss is over the rows with a label, and a linear model."""

    def inputs(self, batch: Any, smoothing: float = 0.0) -> Any:
        return batch["x"]

    def loss(self, outputs: Any, batch: Any, smoothing: float) -> Any:
        wanted = batch["y"] >= 0
        return jnp.where(wanted, (outputs - batch["y"]) ** 2, 0.0).sum(), wanted.sum().astype(jnp.float32)


def forward(params: Any, inputs: Any, key: Any = None) -> Any:
    return (inputs @ params["w"]).sum(axis=-1)


def batch(labels: list[float]) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), "y": np.array(labels, np.float32)}


@pytest.fixture(scope="module")
def linear() -> tuple[Any, Any]:
    """A base and its adapters, neither factor zero."""
    base = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    adapters = jlora.init(jax.random.key(1), base, jlora.LoraConfig(rank=2, targets=("w",)))
    return base, jax.tree.map(lambda x: x + 0.1, adapters)


def stepped(linear: Any, rows: Any, config: FitConfig | None = None, rate: float = 1e-2, **options: Any) -> Any:
    base, adapters = linear
    tx = make_optimizer(config or FitConfig())
    step: Any = make_step(forward, Rows(), tx, optax.constant_schedule(rate), **options)  # pyright: ignore[reportArgumentType]
    return jax.jit(step)(init_state(tx, adapters), base, rows, jax.random.key(2))


@pytest.mark.parametrize("labels", [[1, -1, -1, -1, 2, 3, -1, 4], [-1, 1, -1, 2, -1, 3, -1, 4], [-1.0] * 8])
def test_parts_of_a_batch_are_weighted_by_what_they_count(linear, labels):
    """A part may have no label at all, and a whole batch too: that one changes nothing but by weight decay."""
    whole, metrics = stepped(linear, batch(labels), accumulate=1)
    for parts in (2, 4, 8):
        found, same = stepped(linear, batch(labels), accumulate=parts)
        chex.assert_trees_all_close((found, same), (whole, metrics), rtol=1e-5, atol=1e-6)
    wanted = np.array(labels) >= 0
    base, adapters = linear
    outputs = jlora.lora(forward)(jlora.attach(base, adapters), batch(labels)["x"])
    mean = np.sum((np.asarray(outputs) - labels)[wanted] ** 2) / max(1, wanted.sum())
    np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-5)


def test_the_norm_is_that_of_the_gradient_before_it_is_clipped(linear):
    _, loose = stepped(linear, batch([9.0] * 8), FitConfig(clip=None))
    _, tight = stepped(linear, batch([9.0] * 8), FitConfig(clip=1e-3))
    assert loose["grad_norm"] == tight["grad_norm"] > 1


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lora_plus_moves_b_that_many_times_as_far(linear, decay):
    """And A, and leaves that are trained whole, as far as ever (Hayou et al. 2024)."""
    config = FitConfig(weight_decay=decay)
    plain = stepped(linear, batch([1.0] * 8), config)[0].adapters["w"]
    plus = stepped(linear, batch([1.0] * 8), FitConfig(weight_decay=decay, lora_plus=16))[0].adapters["w"]
    before = linear[1]["w"]
    np.testing.assert_array_equal(plus.a, plain.a)
    np.testing.assert_allclose(plus.b - before.b, 16 * (plain.b - before.b), rtol=1e-3)
    whole = {"w": before, "bias": jnp.ones(3)}
    tx = make_optimizer(FitConfig(lora_plus=16))
    updates: Any = tx.update(jax.tree.map(jnp.ones_like, whole), tx.init(whole), whole)[0]
    np.testing.assert_allclose(updates["w"].b, 16 * jnp.broadcast_to(updates["w"].a[0, 0], (2, 3)), rtol=1e-3)
    np.testing.assert_allclose(updates["bias"], updates["w"].a[0, 0], rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "lora-fa", "riemannian"])
@pytest.mark.parametrize("lora_plus", [1.0, 4.0])
def test_optimizers_by_name_are_those_of_jlora(linear, optimizer, lora_plus):
    """Wrapped around AdamW, under the clip and LoRA+; matrices decay, biases do not."""
    config = FitConfig(weight_decay=0.3, clip=None, optimizer=optimizer, lora_plus=lora_plus, decay="matrices")
    adapters: Any = {"w": linear[1]["w"], "bias": jnp.ones(3)}
    inner = optax.adamw(1.0, weight_decay=0.3, mask=optim.decay_mask)
    wrap = {"adamw": lambda tx: tx, "lora-fa": optim.lora_fa, "riemannian": optim.riemannian}[optimizer]
    theirs, mine = optim.loraplus(wrap(inner), lora_plus), make_optimizer(config)
    grads = jax.tree.map(lambda x: jnp.sin(100 * x + 1), adapters)
    wanted, _ = theirs.update(grads, theirs.init(adapters), adapters)
    found: Any = mine.update(grads, mine.init(adapters), adapters)[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(-x, y, rtol=1e-4, atol=1e-6), found, wanted)
    assert bool(found["w"].a.any()) == (optimizer != "lora-fa")


def test_a_step_of_lora_fa_has_no_gradient_of_a(linear):
    """The norm of the gradient is that of B's alone; A stays."""
    config = FitConfig(optimizer="lora-fa")
    (_, loose), (state, tight) = (stepped(linear, batch([1.0] * 8), config, freeze_a=f) for f in (False, True))
    assert tight["grad_norm"] < loose["grad_norm"]
    before = linear[1]["w"]
    np.testing.assert_array_equal(state.adapters["w"].a, before.a)
    assert not np.array_equal(state.adapters["w"].b, before.b)


def test_adamw_is_that_of_optax(linear):
    """The direction along which the step goes is optax's AdamW, with the rate taken out."""
    base, adapters = linear
    config = FitConfig(weight_decay=0.1, clip=0.5)
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))
    grads = jax.tree.map(lambda x: jnp.sin(100 * x), adapters)
    mine, ours = make_optimizer(config), adapters
    state, other, theirs = mine.init(ours), chain.init(adapters), adapters
    for _ in range(3):
        updates, state = mine.update(grads, state, ours)
        ours = optax.apply_updates(ours, optax.tree.scale(-1e-2, updates))
        updates, other = chain.update(grads, other, theirs)
        theirs = optax.apply_updates(theirs, updates)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


# When something is due


def test_the_intervals_of_epochs_and_steps():
    intervals = Intervals.of(2, 10, log_every=None, eval_every=1, eval_every_steps=None)
    assert (intervals.steps, intervals.log) == (20, 1)
    assert [done for done in range(1, 21) if intervals.is_eval_due(done)] == [10, 20]
    intervals = Intervals.of(2, 10, log_every=4, eval_every=1, eval_every_steps=7)
    assert [done for done in range(1, 21) if intervals.is_eval_due(done)] == [7, 14, 20]
    assert [done for done in range(1, 21) if intervals.is_log_due(done)] == [4, 7, 8, 12, 14, 16, 20]
    assert [done for done in range(1, 21) if intervals.is_epoch_end(done)] == [10, 20]


def test_evaluation_by_steps_is_in_the_records(work, tmp_path):
    code, printed = program(*flags(work, tmp_path / "run", "--eval-every-steps 6 --log-every 5"))
    assert code == 0, printed
    found = records(tmp_path / "run")
    assert [one["step"] for one in found if "validation_accuracy" in one] == [6, 12, 16]
    assert [one["step"] for one in found if "epoch" not in one] == [5, 6, 10, 12, 15]
    assert "fit  step  6 of 16  epoch 1 of 2  loss" in printed and "fit  step 16 of 16  epoch 2 of 2 done" in printed


# Speed


def test_averages_have_the_speed_of_the_steps_that_were_timed():
    averages = Averages()
    for i in range(4):
        counts = StepCounts(8, tokens=100, ideal_seconds=0.1, padded_tokens=125, loss_tokens=40)
        averages.add({"loss": float(i)}, counts, 0.5 if i else None, waited=0.02)
    assert averages.compute() == {
        "loss": 1.5, "step_seconds": 0.5, "examples_per_second": 16.0, "tokens_per_second": 200.0,
        "loss_tokens_per_second": 80.0, "tokens": 400, "loss_tokens": 160, "padding": pytest.approx(0.2),
        "input": pytest.approx(0.04), "mfu": pytest.approx(0.2),
    }  # fmt: skip


@pytest.mark.slow
def test_utilization_is_the_products_by_the_time_at_the_peak(work, tmp_path, monkeypatch):
    """On a device with a known peak; what is recomputed does not count, and padding is no token."""
    monkeypatch.setattr(flops, "peak", lambda device: 1e9)
    found = {}
    for remat in ("none", "full"):
        folder = tmp_path / remat
        code, printed = program(*flags(work, folder, f"--compute.remat {remat} --log-every 1 --data.buckets 16"))
        assert code == 0, printed
        assert "of the devices' bfloat16 peak" in printed
        timed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "mfu" in line]
        found[remat] = {round(one["mfu"] * one["step_seconds"] * 1e9) for one in timed if "epoch" not in one}
    assert len(found["none"]) == 1 and found["none"] == found["full"]
    opened = open_run(tmp_path / "none")
    # Two layers of six linears of a forward and an activation's backward pass, at the least.
    leaves, _ = named_leaves(opened.params)
    linears = sum(leaf.size for path, leaf in leaves.items() if path.endswith("kernel"))
    assert found["none"].pop() > 3 * linears * 8 * 16

    lengths = [len(opened.network.tokenizer(row["sentence"])["input_ids"]) for row in tiny.sentences(64)]
    ends = [json.loads(line) for line in (tmp_path / "none/metrics.jsonl").read_text().splitlines() if "epoch" in line]
    last = ends[-1]  # of the second epoch, in which nothing is compiled
    assert last["tokens_per_second"] * last["step_seconds"] * 8 == pytest.approx(sum(lengths), rel=1e-6)
    summary = json.loads((tmp_path / "none/summary.json").read_text())
    assert summary["peak_memory_bytes"] > 10**7 and {*throughput.SPEEDS} - {"loss_tokens_per_second"} <= summary.keys()


# Dtypes and memory


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_bfloat16_computes_and_float32_is_trained(work, tmp_path, remat):
    """What comes of it is close to float32's."""
    more = f"--compute.remat {remat} --compute.accumulate 2 --model.dtype bfloat16"
    code, printed = program(*flags(work, tmp_path / "half", more))
    assert code == 0, printed
    adapters = jlora.load(tmp_path / "half/adapters")
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {np.dtype("float32")}
    assert program(*flags(work, tmp_path / "whole"))[0] == 0
    for one, other in zip(records(tmp_path / "half"), records(tmp_path / "whole"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.02)


# Writers


def test_tensorboard_is_written_where_it_is_asked_for(work, tmp_path):
    code, printed = program(*flags(work, tmp_path / "run", "--log tensorboard"))
    assert code == 0, printed
    assert list((tmp_path / "run/tensorboard/fit").glob("events.*"))


def test_a_missing_writer_is_an_error_before_anything_is_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, printed = program("--log", "wandb", "--data.train", "nowhere.jsonl", "--run-dir", str(tmp_path / "run"))
    assert (code, "pip install -e '.[wandb]'" in printed) == (2, True), printed
    assert not (tmp_path / "run").exists()


def test_a_run_returns_its_summary(work, tmp_path):
    summary = run(parse(flags(work, tmp_path / "run")))
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert "trainable: 290 of 5,922 (4.90%)\n" in (tmp_path / "run/plan.txt").read_text()

"""Law 9: one configuration gives one loss curve, whatever computes it: layouts, processes, parts of a batch."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jlora
from jlora import models
from tests import tiny
from tests.runs import assert_same_curve, compilations, free_port, program, records, start
from train.__main__ import main
from train.compute.keys import random_key
from train.compute.layouts import Mesh, Pmap, one_device, parse_spec
from train.compute.optimizer import make_optimizer
from train.compute.step import init_state, make_step
from train.config import ComputeConfig, FitConfig
from train.loop.stop import EXIT_CODE
from train.tasks.base import cross_entropy

LAYOUTS = {
    "pmap": "pmap",
    "8x1x1": "mesh",
    "1x8x1": "mesh --compute.fsdp 8",
    "2x2x2": "mesh --compute.fsdp 2 --compute.tensor 2",
    "1x1x2": "mesh --compute.data 1 --compute.tensor 2",
    "accumulated": "jit --compute.accumulate 4",
    "all of it": "mesh --compute.data 2 --compute.fsdp 2 --compute.accumulate 2 --compute.remat full",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A language model's checkpoint, and sums of which the answers are learnt: rows of different numbers of tokens."""
    folder = tmp_path_factory.mktemp("parallel")
    tiny.write_checkpoint(folder / "decoder", tiny.DECODER, task="causal-lm")
    rows = [{"question": f"{i} + {j} =", "answer": " ".join(str(i + j) * (1 + j))} for i in range(6) for j in range(4)]
    tiny.write_jsonl(folder / "train.jsonl", rows)
    tiny.write_jsonl(folder / "test.jsonl", rows[:11])
    return folder


def flags(work: Path, run_dir: Path, compute: str = "jit") -> list[str]:
    return [
        "configs/instruct_llama.py", "--model.path", str(work / "decoder"), "--data.train", str(work / "train.jsonl"),
        "--data.validation", "None", "--cache-dir", str(work / "cache"), "--run-dir", str(run_dir), *(
            "--model.dtype float32 --model.param-dtype float32 --task.max-length 32 --task.no-pack "
            "--task.messages None --task.prompt question --task.completion answer --lora.rank 2 --lora.alpha 4 "
            "--lora.dropout 0 --learning-rate.lora 0.01 --fit.epochs 8 --fit.batch-size 8 --fit.label-smoothing 0.1 "
            f"--fit.lora-plus 4 --eval-batch-size 4 --eval-every 4 --save.every-steps 5 --compute.layout {compute}"
        ).split(),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(work) -> list[dict[str, Any]]:
    """The records of one device."""
    code, printed = program(*flags(work, work / "jit"))
    assert code == 0, printed
    return records(work / "jit")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_curve(work, expected, layout):
    """Sums and counts of masked losses are added before they are divided, so it does not matter how rows are dealt."""
    code, printed = program(*flags(work, work / layout, LAYOUTS[layout]))
    assert code == 0, printed
    assert len(expected) == 24 + 8
    assert_same_curve(records(work / layout), expected)
    summary = json.loads((work / layout / "summary.json").read_text())
    assert summary["layout"].split()[0] in ("jit", "pmap", "mesh")
    # What was kept is read in this process, whatever wrote it.
    code, printed = program("eval", str(work / layout))
    assert code == 0, printed
    assert float(re.findall(r"loss (\S+)", printed)[0]) == pytest.approx(expected[-1]["validation_loss"], abs=6e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_in_chunks_give_the_same_curve(work, expected, layout, monkeypatch):
    """As for a large vocabulary: the logits of a few tokens of each row at a time, in training and evaluation."""
    monkeypatch.setattr("jlora.models._loss._SMALL", 0)
    monkeypatch.setattr("jlora.models._loss._TOKENS", 12)
    folder = work / f"chunks {layout}"
    code, printed = program(*flags(work, folder, LAYOUTS[layout]))
    assert code == 0, printed
    assert_same_curve(records(folder), expected)


def wait_for(done: Callable[[], bool], processes: list[Any], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it takes too long"
        assert all(one.poll() is None for one in processes), [one.communicate()[0] for one in processes]
        time.sleep(0.05)


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "found_by"), [("mesh --compute.fsdp 2", "flags"), ("pmap", "Slurm")])
def test_two_processes_are_stopped_and_one_resumes(work, expected, tmp_path, layout, found_by):
    """Two processes of two devices train; one of them is asked to stop, and both do; one with four devices resumes."""
    folder, port = tmp_path / "run", free_port()
    argv = flags(work, folder, layout)
    if found_by == "flags":
        own = [["--processes.coordinator", f"localhost:{port}", "--processes.count", "2"] for _ in range(2)]
        both = [start(*argv, *own[i], "--processes.index", str(i), devices=2) for i in range(2)]
    else:
        # As srun sets them; JAX takes the port from the job's number.
        job = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        job |= {"SLURM_STEP_NUM_TASKS": "2"}
        both = [start(*argv, devices=2, **job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    try:
        wait_for(lambda: lines(folder) >= 3, both)
        both[1].send_signal(signal.SIGTERM)
        printed = [one.communicate(timeout=120)[0] for one in both]
    finally:
        for one in both:
            one.kill()
    stopped = [one.returncode for one in both]
    if lines(folder) < len(expected):
        assert stopped == [EXIT_CODE, EXIT_CODE], printed
        assert "the same command resumes from there" in printed[0]
    one = start(*argv, devices=4)
    printed = one.communicate(timeout=120)[0]
    assert one.returncode == 0, printed
    assert "resuming " in printed or stopped == [0, 0]
    assert_same_curve(records(folder), expected)


@pytest.mark.slow
def test_a_single_process_that_was_joined_heeds_sigterm(work, tmp_path):
    """JAX takes the signal over as soon as processes are joined, also of one, which takes it back."""
    own = ["--processes.coordinator", f"localhost:{free_port()}", "--processes.count", "1", "--processes.index", "0"]
    one = start(*flags(work, tmp_path / "run"), *own, "--fit.epochs", "10000")
    try:
        wait_for(lambda: lines(tmp_path / "run") >= 1, [one])
        one.send_signal(signal.SIGTERM)
        printed = one.communicate(timeout=60)[0]
    finally:
        one.kill()
    assert one.returncode == EXIT_CODE, printed


@pytest.mark.slow
def test_processes_that_differ_are_told(work, tmp_path):
    """Each would train something else, and nobody would know: both end at once, and one names the field."""
    port = free_port()
    own = ["--processes.coordinator", f"localhost:{port}", "--processes.count", "2", "--processes.index"]
    both = [start(*flags(work, tmp_path / "run", "pmap"), "--seed", str(i), *own, str(i), devices=4) for i in range(2)]
    try:
        printed = [one.communicate(timeout=120)[0] for one in both]
    finally:
        for one in both:
            one.kill()
    assert "processes: the configuration differs between them" in printed[0] + printed[1]
    assert both[0].returncode == 2 and both[1].returncode != 0
    assert not (tmp_path / "run").exists()


# What is refused


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        ("pmap --compute.fsdp 2", "compute.layout: got 'pmap' with fsdp=2; only a mesh has these axes"),
        ("jit --compute.data 2 --compute.tensor 2", "got 'jit' with data=2 and tensor=2; only a mesh has these axes"),
        ("mesh --compute.fsdp 3", "a mesh of data=2 x fsdp=3 x tensor=1 does not fit on 8 cpu devices"),
        ("mesh --compute.accumulate 3", "fit.batch_size: got 8, expected a multiple of 24: 8 parts of the rows"),
        ("pmap --compute.rules lm_head fsdp", "compute.rules: got rules with 'pmap', expected none"),
        ("mesh --compute.rules nothing fsdp", "rule 'nothing' matches no leaf"),
        ("mesh --compute.rules ( fsdp", "compute.rules: got {'(': 'fsdp'}, expected patterns of paths"),
        ("mesh --compute.rules q_proj fsdp,,tensor", "expected patterns of paths, and for each axes of the mesh"),
        ("mesh --compute.rules q_proj -,data,rows", "rule 'q_proj' names 'rows'"),
        ("mesh --compute.fsdp 4 --compute.tensor 2 --compute.rules mlp/up_proj -,-,fsdp+tensor+data", None),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(work, tmp_path, compute, message):
    code, printed = program(*flags(work, tmp_path / "run", compute), "--fit.epochs", "1")
    assert (code, message is None or message in printed) == (0 if message is None else 2, True), printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--processes.count 2",
            "processes.coordinator: got no coordinator and no index; expected coordinator, count and index",
        ),
        ("--processes.coordinator here --processes.count 2 --processes.index 2", "got 'here', expected HOST:PORT"),
        ("--processes.coordinator a:1 --processes.count 2 --processes.index 2", "expected less than processes.count"),
    ],
)
def test_processes_that_cannot_be_are_refused(argv, message, capsys):
    assert main(argv.split()) == 2
    assert message in capsys.readouterr().err


def test_specs_are_written_by_axes():
    assert parse_spec("fsdp, -,fsdp+tensor") == P("fsdp", None, ("fsdp", "tensor"))


# Memory


@pytest.fixture(scope="module")
def sharded() -> tuple[Mesh, Any, Any, Any]:
    """A decoder with weights that are large beside its activations: mesh, base, state and the step's memory."""
    config = tiny.DECODER | {
        "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 512, "vocab_size": 128,
    }  # fmt: skip
    model: Any = models.build(config, task="causal-lm")
    mesh = Mesh(ComputeConfig(layout="mesh", fsdp=8), models.sharding_rules(model))

    class Tokens:
        def inputs(self, batch: Any, smoothing: float = 0.0) -> Any:
            return {"input_ids": batch["input_ids"]}

        def loss(self, outputs: Any, batch: Any, smoothing: float) -> Any:
            return outputs.sum(), jnp.float32(outputs.size)

    def forward(params: Any, inputs: Any, key: Any = None) -> Any:
        return model.apply(params, **inputs)

    shapes = models.abstract(model)

    def make(places: Any) -> Any:
        init = jax.jit(lambda key: {"params": model.init(key, jnp.zeros((1, 8), int))["params"]}, out_shardings=places)
        return jax.block_until_ready(init(jax.random.key(0)))

    base = mesh.place_base(shapes, make)
    rows = np.zeros((8, 4), np.int32)
    uses, tx = jlora.trace(forward, shapes, {"input_ids": rows}), make_optimizer(FitConfig())
    config = jlora.LoraConfig(rank=2)
    state = mesh.make_state(lambda base: init_state(tx, jlora.init(jax.random.key(1), base, config, uses)), base)
    step: Any = make_step(forward, Tokens(), tx, optax.constant_schedule(1e-3))  # pyright: ignore[reportArgumentType]
    batch = mesh.place_batch(lambda part: {"input_ids": rows[part]}, 8)
    compiled = mesh.compile_step(step, state).lower(state, base, batch, random_key(0, "dropout")).compile()
    return mesh, base, state, compiled.memory_analysis()


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_no_device_ever_holds_the_whole_base(sharded):
    """Each has an eighth at rest; and in the step, with what it fetches, computes and returns, less than the base."""
    _, base, state, memory = sharded
    whole = nbytes(base)
    for device in jax.devices():
        own = sum(
            shard.data.nbytes for x in jax.tree.leaves(base) for shard in x.addressable_shards if shard.device == device
        )
        assert own < 1.02 * whole / 8
    assert memory.argument_size_in_bytes < whole / 8 + nbytes(state)
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.6 * whole


def test_the_optimizer_state_is_twice_the_adapters_and_lies_as_they_do(sharded):
    _, _, state, _ = sharded
    assert nbytes(state.opt_state) == 2 * nbytes(state.adapters) + 4
    moments = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
    for moment in moments:
        for one, other in zip(jax.tree.leaves(moment), jax.tree.leaves(state.adapters), strict=True):
            assert one.sharding == other.sharding
    assert any("fsdp" in x.sharding.spec for x in jax.tree.leaves(state.adapters))


# The parts of a layout


PLACED = [one_device(), Pmap(), Mesh(ComputeConfig(layout="mesh", fsdp=4), [(r"", P(None, "fsdp"))])]


@pytest.mark.parametrize("layout", PLACED, ids=str)
def test_a_step_is_compiled_once_and_donates_its_state(layout):
    """Whatever the shardings of its first state, and of the state that it returns."""
    weights = {"w": np.ones((4, 8), np.float32)}
    base = layout.place_base(weights, lambda places: jax.device_put(weights, places))
    state = layout.make_state(lambda base: init_state(optax.adam(1.0), {"w": 2 * base["w"]}), base)

    def step(state: Any, base: Any, batch: Any, key: Any) -> Any:
        moved = jax.tree.map(lambda x: x + jnp.asarray(batch["x"].mean(), x.dtype), state)
        return moved, {"loss": base["w"].sum() + jax.random.uniform(key)}

    compiled, programs = layout.compile_step(step, state), []
    for i in range(3):
        with compilations() as seen:
            before = jax.tree.leaves(state)
            batch = layout.place_batch(lambda part, i=i: {"x": np.arange(16, dtype=np.float32)[part] + i}, 16)
            state, metrics = compiled(state, base, batch, jax.random.key(i))
            jax.block_until_ready((state, metrics))
        assert all(leaf.is_deleted() for leaf in before)
        programs.append(len(seen))
    assert programs[0] and not any(programs[1:])


@pytest.mark.parametrize("layout", PLACED, ids=str)
def test_what_is_placed_comes_back(layout):
    """Base, state and rows are the same on the host again, and on the way to a disk."""
    base = {"w": np.arange(32, dtype=np.float32).reshape(4, 8)}
    placed = layout.place_base(
        base, lambda s: jax.tree.map(jnp.asarray, base) if s is None else jax.device_put(base, s)
    )
    np.testing.assert_array_equal(layout.to_host(placed)["w"], base["w"])
    np.testing.assert_array_equal(
        layout.to_host(layout.call(lambda x: jax.tree.map(jnp.sin, x), placed))["w"], jnp.sin(base["w"])
    )

    state = layout.make_state(lambda base: init_state(optax.adam(1.0), {"w": 2 * base["w"]}), placed)
    again = layout.from_disk(layout.to_disk(state))
    for one in (state, again):
        np.testing.assert_array_equal(layout.to_host(one.adapters)["w"], 2 * base["w"])

    rows = np.arange(16, dtype=np.float32)
    built: list[slice] = []

    def build(part: slice) -> dict[str, np.ndarray]:
        built.append(part)
        return {"x": rows[part]}

    batch = layout.place_batch(build, 16)
    each = layout.compile_rows(lambda base, _, batch: {"y": batch["x"] * base["w"].sum()})
    np.testing.assert_array_equal(each(placed, None, batch)["y"], rows * base["w"].sum())
    assert sum(part.stop - part.start for part in built) == 16


def test_smoothed_labels_are_those_of_optax():
    logits, labels = jax.random.normal(jax.random.key(0), (5, 7)), jnp.arange(5)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 7), 0.2)
    np.testing.assert_allclose(
        cross_entropy(logits, labels, 0.2), optax.softmax_cross_entropy(logits, smooth), rtol=1e-5
    )
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_array_equal(cross_entropy(logits, labels), plain)

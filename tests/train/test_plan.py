"""`python -m train plan`: the step of a run, compiled for devices that may not be here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import tiny
from tests.runs import program, start
from train import ahead
from train.__main__ import parse
from train.ahead import step_costs
from train.commands.advice import advise
from train.compute import layouts
from train.compute.compiled import Compiled
from train.compute.layouts import make_layout
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.step import init_state, make_step
from train.compute.topology import topology_devices
from train.config import ComputeConfig, TrainConfig
from train.job import make_job, start_adapters
from train.tasks.stand_in import stand_in

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny.write_checkpoint(folder / "decoder", tiny.DECODER, task="causal-lm")
    tiny.write_checkpoint(folder / "encoder", tiny.ENCODER, task="sequence-classification", labels=("bad", "good"))
    questions = [{"question": f"{i} + {j} =", "answer": str(i + j)} for i in range(12) for j in range(8)]
    tiny.write_jsonl(folder / "sums.jsonl", questions)
    tiny.write_jsonl(folder / "texts.jsonl", [{"sentence": "a film", "label": i % 2, "score": i / 9} for i in range(9)])
    return folder


def language_model(work: Path, *more: str) -> list[str]:
    common = "--data.validation None --data.holdout 0.2 --task.max-length 32 --task.messages None --lora.rank 2"
    rest = "--task.prompt question --task.completion answer --fit.batch-size 8 --model.param-dtype None"
    paths = ["--model.path", str(work / "decoder"), "--data.train", str(work / "sums.jsonl")]
    return ["configs/instruct_llama.py", *paths, *common.split(), *rest.split(), *more]


def classifier(work: Path, *more: str) -> list[str]:
    common = "--data.validation None --data.holdout 0.2 --task.max-length 32 --fit.batch-size 4 --task.labels bad good"
    paths = ["--model.path", str(work / "encoder"), "--data.train", str(work / "texts.jsonl")]
    return ["configs/sst2_minilm.py", *paths, *common.split(), *more]


TASKS = {
    "language model": lambda work: language_model(work, "--task.no-pack"),
    "packed": language_model,
    "texts": classifier,
    "regression": lambda work: classifier(
        work, "--task.regression", "--task.labels", "None", "--task.label", "score", "--keep", "last"
    ),
    "images": lambda work: ["configs/digits.py", "--task.side", "8", "--fit.batch-size", "8"],
}


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_stands_for_those_of_the_data(name: str, work: Path, tmp_path: Path) -> None:
    """The same columns, dtypes and sizes; texts as long as they may be."""
    config = parse([*TASKS[name](work), "--cache-dir", str(tmp_path)])
    job = make_job(config, lambda: None)
    planned, expected = stand_in(config).batch, job.examples
    assert set(planned) == set(expected)
    for column, shape in planned.items():
        value = np.asarray(expected[column][0])
        assert shape.shape[0] == config.fit.batch_size and shape.dtype == value.dtype, column
        ragged = column in ("input_ids", "attention_mask", "loss_mask", "segment_ids", "token_type_ids")
        assert shape.shape[1:] == ((32,) if ragged else value.shape), column


LAYOUTS = [
    "jit",
    "mesh --compute.fsdp 4",
    "mesh --compute.fsdp 2 --compute.tensor 2 --compute.remat full",
    "jit --compute.accumulate 2",
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_memory_is_that_of_the_step_that_runs(layout: str, work: Path, tmp_path: Path) -> None:
    config = parse([*language_model(work, "--cache-dir", str(tmp_path), "--compute.layout", *layout.split())])
    costs = step_costs(config, jax.devices())
    job = make_job(config, lambda: None)
    layout_, key = make_layout(config, job.network.rules), jax.random.key(0)
    base = layout_.place_base(job.shapes, lambda shardings: jax.jit(job.network.init, out_shardings=shardings)(key))
    tx = make_optimizer(config.fit)
    step = make_step(
        job.network.forward, job.task, tx, make_schedule(config.fit, 1e-3, 9), accumulate=config.compute.accumulate
    )
    made = layout_.make_state(lambda base: init_state(tx, start_adapters(config, job.network, base, job.plan)), base)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in stand_in(config).batch.items()}
    placed: Any = layout_.place_batch(lambda rows: {name: x[rows] for name, x in batch.items()}, 8)
    real = Compiled(layout_.compile_step(step, made).lower(made, base, placed, key).compile())
    given = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves((base, made.adapters, made.opt_state)))
    assert costs.base_bytes + costs.adapters_bytes + costs.optimizer_bytes == given
    assert costs.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)  # the schedule differs
    assert costs.devices == layout_.devices and costs.fits and costs.layout == str(layout_)
    assert bool(costs.collectives) == (costs.devices > 1)


def test_loops_count_as_often_as_they_run() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))

    def summed(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "x") * 0.25, None), x, length=5)[0]

    fn = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, P()))
    compiled: Any = fn.lower(x).compile()
    found = Compiled(compiled)
    assert found.collectives == {"all-reduce": 5 * 8 * 128 * 4}
    assert found.cycles == 0 and found.largest(1)[0].shape == "f32[8,128]"
    assert found.temp_bytes == compiled.memory_analysis().temp_size_in_bytes


TPU_PROGRAM = """
%start (p: f32[64]) -> (f32[64], f32[256]) {
  %p = f32[64]{0} parameter(0)
  %all-gather.1 = f32[256]{0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %begun = (f32[64]{0}, f32[256]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%overlapping (p: f32[64]) -> f32[256] {
  %p = f32[64]{0} parameter(0)
  ROOT %all-gather.2 = f32[256]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%inner_condition (s: (u32[], f32[64], u32[])) -> pred[] {
  %s = (u32[], f32[64]{0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%s), index=0
  %limit = u32[] constant(8)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%inner (s: (u32[], f32[64], u32[])) -> (u32[], f32[64], u32[]) {
  %s = (u32[], f32[64]{0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%s), index=0
  %x = f32[64]{0} get-tuple-element(%s), index=1
  %by = u32[] get-tuple-element(%s), index=2
  %next = u32[] add(%i, %by)
  %send = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3
  %sent = f32[64]{0} collective-permute-done(%send), backend_config={"estimated_cycles":"10"}
  ROOT %new = (u32[], f32[64]{0}, u32[]) tuple(%next, %sent, %by)
}

%outer_condition (s: (s32[], f32[64])) -> pred[] {
  %s = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[64]{0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %zero = u32[] constant(0)
  %two = u32[] constant(2)
  %first = u32[] copy(%zero)
  %state = (u32[], f32[64]{0}, u32[]) tuple(%first, %x, %two)
  %while.1 = (u32[], f32[64]{0}, u32[]) while(%state), condition=%inner_condition, body=%inner
  %y = f32[64]{0} get-tuple-element(%while.1), index=1
  ROOT %new = (s32[], f32[64]{0}) tuple(%next, %y)
}

ENTRY %main (x: f32[64]) -> f32[256] {
  %x = f32[64]{0} parameter(0)
  %gather = (f32[64]{0}, f32[256]{0}) fusion(%x), kind=kCustom, calls=%start
  %zero = s32[] constant(0)
  %state = (s32[], f32[64]{0}) tuple(%zero, %x)
  %while.2 = (s32[], f32[64]{0}) while(%state), condition=%outer_condition, body=%outer, backend_config={}
  ROOT %done = f32[256]{0} fusion(%x), kind=kOutput, calls=%overlapping, backend_config={"estimated_cycles":"7"}
}
"""


def test_what_a_tpu_program_leaves_out_is_found() -> None:
    """How often its loops run, which its compiler does not note, and collectives that are fused, each once."""

    class Program:
        def memory_analysis(self) -> Any:
            return jax.jit(jnp.sin).lower(1.0).compile().memory_analysis()

        def as_text(self) -> str:
            return TPU_PROGRAM

    found = Compiled(Program())
    assert found.unknown_loops == 0 and found.cycles == 5 * 4 * 10 + 7
    assert found.collectives == {"collective-permute": 5 * 4 * 64 * 4, "all-gather": 256 * 4}
    unknown = TPU_PROGRAM.replace("%limit = s32[] constant(5)", "%limit = s32[] get-tuple-element(%s), index=0")
    Program.as_text = lambda self: unknown
    found = Compiled(Program())
    assert found.unknown_loops == 1 and found.cycles == 4 * 10 + 7


@needs_libtpu
def test_a_scan_costs_a_tpu_as_much_as_its_iterations() -> None:
    def repeated(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    device = topology_devices("v5e:1x1")[0]
    place = NamedSharding(Mesh(np.array([device]), ("x",)), P())

    def cycles(length: int) -> int:
        shapes = ((512, 512), (length, 512, 512))
        args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
        compiled: Any = jax.jit(repeated, out_shardings=place).lower(*args).compile()
        return Compiled(compiled).cycles

    assert cycles(48) == pytest.approx(3 * cycles(16), rel=0.15)


def test_it_prints_tables_or_json(work: Path) -> None:
    code, printed = program("plan", *language_model(work))
    assert code == 0, printed
    for part in (
        "on each device",
        "adapters",
        "8 rows, 256 tokens",
        "largest arrays",
        "fits: ",
        "divided among 8 devices",
        "float32, as config.json has it",
    ):
        assert part in printed
    code, printed = program("plan", "--json", *language_model(work))
    assert code == 0 and json.loads(printed)["tokens"] == 256, printed


def advice(work: Path, monkeypatch: pytest.MonkeyPatch, memory: float, *flags: str) -> tuple[dict[str, Any], Any]:
    """What ``plan --json`` prints if a device has ``memory`` times what the step needs, and the configuration."""
    options = language_model(work, *flags)
    needed = step_costs(parse(options), jax.devices()).peak_bytes
    monkeypatch.setattr(ahead, "device_memory", lambda devices: int(memory * needed))
    code, printed = program("plan", "--json", *options)
    assert code == 0, printed
    return json.loads(printed), options


ADVICE = {
    "fsdp": (0.9, "--task.max-length 128"),
    "micro-batches": (0.05, "--task.max-length 128 --fit.batch-size 64"),
    "recomputed": (0.9, "--task.max-length 128 --compute.layout mesh --compute.fsdp 8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADVICE)
def test_its_advice_fits(name: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that it ends with give a step that the devices have the memory for, after few compilations."""
    memory, flags = ADVICE[name]
    found, options = advice(work, monkeypatch, memory, *flags.split())
    assert not found["fits"] and len(found["alternatives"]) <= 6
    *others, last = found["alternatives"]
    assert last["fits"] and not any(other["fits"] for other in others)
    again = step_costs(parse([*options, *last["flags"].split()]), jax.devices())
    assert again.fits and again.peak_bytes == last["peak_bytes"]


@pytest.mark.slow
def test_advice_names_what_the_devices_do_not_divide(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 rows are no multiple of 8 devices: fsdp alone is skipped, and a mesh with tensor is compiled."""
    found, _ = advice(work, monkeypatch, 0.9, "--fit.batch-size", "12")
    first, second, *_ = found["alternatives"]
    assert "--compute.fsdp 8" in first["flags"] and "fit.batch_size: got 12" in first["refused"]
    assert "--compute.fsdp 4 --compute.tensor 2" in second["flags"] and second["fits"]


class Needs(NamedTuple):
    """What a step costs in a world where memory is the weights' part and a number for each row at once."""

    peak_bytes: float
    working_bytes: float
    device_memory: float

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.device_memory


def searched(memory: float, *flags: str) -> tuple[list[str], Any]:
    """The flags that `advise` tries on 8 devices whose layers have 4 parts, and what it returns."""
    tried: list[str] = []

    def attempt(flags: str, config: TrainConfig) -> Any:
        tried.append(flags)
        compute = config.compute
        split = compute.fsdp * compute.tensor if compute.layout == "mesh" else 1
        parts = split // compute.tensor
        if config.fit.batch_size % (parts * compute.accumulate) or compute.tensor > 4:
            return None
        rows = config.fit.batch_size / (parts * compute.accumulate)
        working = rows * (10 if compute.remat == "full" else 30) / compute.tensor
        return Needs(80 / split + working, working, memory)

    config = parse(["configs/digits.py", "--compute.layout", "jit", *flags])
    found = advise(config, 8, attempt("", config), attempt)
    return tried[1:], found


FSDP = "--compute.layout mesh --compute.fsdp 8"


def test_advice_goes_from_the_cheapest_settings_to_the_most_costly() -> None:
    rows = ["--fit.batch-size", "64"]
    assert searched(251, *rows) == ([FSDP], Needs(250, 240, 251))
    assert searched(90, *rows)[0] == [FSDP, f"{FSDP} --compute.remat full"]
    tried, found = searched(50, *rows)
    assert tried[-1] == f"{FSDP} --compute.accumulate 2 --compute.remat full" and found.peak_bytes == 50
    tried, found = searched(16, *rows)
    assert "--compute.tensor 2" in tried[-1] and found.fits and len(tried) <= 6
    tried, found = searched(1, *rows)
    assert found is None and len(tried) <= 7


def test_advice_passes_over_what_the_devices_do_not_divide() -> None:
    """12 rows are no multiple of 8 devices; another batch comes last."""
    tried, found = searched(100, "--fit.batch-size", "12")
    assert tried == [FSDP, "--compute.layout mesh --compute.fsdp 4 --compute.tensor 2"] and found.fits
    tried, found = searched(21, "--fit.batch-size", "9")
    assert found.fits and "--fit.batch-size 8" in tried[-1] and not any("batch" in flags for flags in tried[:-1])


def test_what_cannot_be_compiled_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = program("plan", "configs/digits.py")
    assert code == 2 and "task.side: got None" in printed and "--task.side" in printed, printed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, printed = program("plan", *language_model(work), "--topology", "v5e:2x4")
    assert code == 2 and 'pip install -e ".[train,tpu]"' in printed, printed


@needs_libtpu
def test_a_mesh_may_split_the_axes_of_a_slice() -> None:
    """8 x 2 on 4 x 4 chips, which `jax.make_mesh` refuses."""
    devices = topology_devices("v6e:4x4")
    layout = layouts.Mesh(ComputeConfig(layout="mesh", fsdp=8, tensor=2), layouts.REPLICATED, devices)
    assert dict(layout.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 2}


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_is_planned_that_is_not_there(work: Path) -> None:
    """More than a chip has is refused by its compiler, and the advice compiles and fits."""
    size = "--task.max-length 128 --fit.batch-size 32768 --model.param-dtype bfloat16 --model.dtype bfloat16"
    flags = [*language_model(work), *size.split(), "--topology", "v5e:2x4", "--json"]
    running = start("plan", *flags)
    printed, _ = running.communicate()
    assert running.returncode == 0, printed
    found = json.loads(printed[printed.index("{") :])
    assert found["fits"] is False and found["peak_bytes"] > found["device_memory"] == 16 * 2**30
    *_, last = found["alternatives"]
    assert last["fits"] and last["peak_bytes"] < 16 * 2**30 and bool(last["collectives"]) == (last["devices"] > 1)
    assert last["cycles"] > 0 and 0 < last["estimated_mfu"] < 1 and last["device_kind"] == "TPU v5 lite"
    code = start("plan", *language_model(work), "--topology", "v99:1x1")
    printed, _ = code.communicate()
    assert code.returncode == 2 and "got 'v99:1x1'" in printed, printed

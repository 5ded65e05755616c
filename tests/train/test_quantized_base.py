"""`--base.quantize`: adapters are trained on a base in few bits as on its dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models
from tests import tiny
from tests.messages import expect
from tests.runs import assert_same_curve, assert_same_run, program, records, stopping
from train.commands import export
from train.loop.stop import EXIT_CODE
from train.rundir.finished import open_run

SETTINGS = (
    "--model.dtype float32 --model.param-dtype float32 --task.max-length 16 --task.no-pack --task.messages None "
    "--task.prompt question --task.completion answer --lora.rank 2 --lora.dropout 0 --learning-rate.lora 0.01 "
    "--fit.epochs 3 --fit.batch-size 8 --eval-batch-size 8 --save.every-steps 4"
)
LAYOUTS = {
    "jit": "jit",
    "pmap": "pmap",
    "mesh": "mesh --compute.fsdp 2 --compute.tensor 2 --compute.accumulate 2 --compute.remat full",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's checkpoint, sums to learn, and a run on a base in NF4."""
    folder = tmp_path_factory.mktemp("quantized")
    tiny.write_checkpoint(folder / "decoder", tiny.DECODER, task="causal-lm")
    rows = [{"question": f"{i} + {j} =", "answer": str(i + j)} for i in range(6) for j in range(4)]
    tiny.write_jsonl(folder / "train.jsonl", rows)
    tiny.write_jsonl(folder / "test.jsonl", rows[:9])
    train(folder, "nf4", "--base.quantize nf4")
    return folder


def flags(work: Path, name: str, more: str = "", model: str = "decoder", layout: str = "jit") -> list[str]:
    return [
        "configs/instruct_llama.py", "--model.path", str(work / model), "--data.train", str(work / "train.jsonl"),
        "--data.validation", str(work / "test.jsonl"), "--cache-dir", str(work / "cache"), "--run-dir",
        str(work / name), *f"{SETTINGS} {more} --compute.layout {LAYOUTS[layout]}".split(),
    ]  # fmt: skip


def train(work: Path, name: str, more: str = "", **options: str) -> list[dict[str, Any]]:
    code, printed = program(*flags(work, name, more, **options))
    assert code == 0, printed
    return records(work / name)


def quantized_paths(params: Any) -> set[str]:
    return {path for path, leaf in jlora.named_leaves(params)[0].items() if isinstance(leaf, jlora.QuantizedArray)}


def test_it_trains_as_on_the_dequantized_weights(work: Path) -> None:
    run = open_run(work / "nf4")
    assert (model := run.network.model) is not None
    uses = jlora.trace(model.apply, models.abstract(model), np.zeros((1, 4), np.int32))
    assert quantized_paths(run.params) == {path for path, use in uses.items() if use.kind == "matmul"} - {
        "params/lm_head/kernel"
    }
    models.save(work / "dequantized", model, jlora.dequantize(run.params))
    for file in (work / "decoder").glob("tokenizer*"):
        (work / "dequantized" / file.name).write_bytes(file.read_bytes())
    assert_same_curve(records(work / "nf4"), train(work, "plain", model="dequantized"))
    summary = json.loads((work / "nf4" / "summary.json").read_text())
    assert summary["base"]["scheme"] == "nf4" and summary["metrics"]["base"] != {}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", ["mesh", "pmap"])
def test_every_layout_gives_the_same_curve(work: Path, layout: str) -> None:
    assert_same_curve(train(work, layout, "--base.quantize nf4", layout=layout), records(work / "nf4"))


def test_a_stopped_run_resumes_to_the_same_adapters(work: Path) -> None:
    with stopping(after=5):
        code, printed = program(*flags(work, "resumed", "--base.quantize nf4"))
    assert code == EXIT_CODE, printed
    train(work, "resumed", "--base.quantize nf4")
    assert_same_run(work / "resumed", work / "nf4")


@pytest.mark.slow
def test_a_run_is_evaluated_and_exported(work: Path, tmp_path: Path) -> None:
    run = open_run(work / "nf4")
    code, printed = program("eval", str(work / "nf4"))
    assert code == 0 and f"loss {records(work / 'nf4')[-1]['validation_loss']:.4f}" in printed, printed
    code, printed = program("generate", str(work / "nf4"), "--prompt", "2 + 2 =", "--max-new-tokens", "2")
    assert code == 0, printed
    export.export(work / "nf4", "peft", tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    for to in ("hf", "orbax"):
        code, printed = program("export", str(work / "nf4"), "--to", to, "--out", str(tmp_path / "no"))
        assert code == 2
        expect(printed, str(work / "nf4"), "nf4", "--dequantize", "--to peft")
    export.export(work / "nf4", "hf", tmp_path / "hf", dequantize=True)
    merged = jlora.merge(jlora.dequantize(run.params), run.adapters)
    written = jlora.named_leaves(models.load(tmp_path / "hf")[1])[0]
    for path, leaf in jlora.named_leaves(merged)[0].items():
        np.testing.assert_array_equal(written[path], leaf, err_msg=path)


@pytest.mark.slow
def test_a_quantized_checkpoint_is_trained_as_it_is_stored(work: Path) -> None:
    """Of bitsandbytes, int8; adapters see its dequantized weights."""
    folder = work / "int8"
    tiny.write_checkpoint(folder, tiny.DECODER, task="causal-lm")
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        largest = np.abs(tensors[name]).max(1)
        tensors[name] = np.round(tensors[name] * (127 / largest[:, None])).astype(np.int8)
        tensors[name.replace("weight", "SCB")] = largest
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    train(work, "stored", model="int8")
    run = open_run(work / "stored")
    assert run.network.scheme == "int8" and len(quantized_paths(run.params)) > 1
    code, printed = program(*flags(work, "twice", "--base.quantize nf4", model="int8"))
    assert code == 2
    expect(printed, str(folder), "got 'nf4'", "int8", "--base.quantize None")


@pytest.mark.slow
def test_a_plan_counts_the_bits(work: Path) -> None:
    def base(more: str) -> int:
        code, printed = program("plan", *flags(work, "none", more), "--json")
        assert code == 0, printed
        return json.loads(printed[printed.index("{") :])["base_bytes"]

    params = models.load(work / "decoder", quantize="nf4")[1]
    assert base("--base.quantize nf4") == sum(leaf.nbytes for leaf in jlora.named_leaves(params)[0].values())
    assert base("--base.quantize nf4") < base("--base.quantize int8") < base("")


def test_what_cannot_be_quantized_is_refused(work: Path) -> None:
    for more, parts in {
        "--base.quantize nf5": ("base.quantize: got 'nf5'", "nf4", "int4-64"),
        "--base.quantize nf4 --mode full": ("base.quantize: got 'nf4' with mode 'full'", "--mode lora"),
    }.items():
        code, printed = program(*flags(work, "none", more))
        assert code == 2, printed
        expect(printed, *parts)


def test_a_run_of_an_earlier_version_resumes(work: Path) -> None:
    """Its base was null."""
    with stopping(after=5):
        code, printed = program(*flags(work, "earlier"))
    assert code == EXIT_CODE, printed
    file = work / "earlier" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base": None}))
    train(work, "earlier")
    assert open_run(work / "earlier").config.quantize is None
    code, printed = program(*flags(work, "earlier", "--base.quantize nf4"))
    assert code == 2
    expect(printed, "base.quantize: the run has null", '"nf4"')

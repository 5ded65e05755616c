"""Adapters that are damaged or do not fit: every fault is named, and nothing is half loaded or half written."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import peft
from jlora.files.errors import TensorError
from jlora.files.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.messages import expect, message
from tests.peft_cases import PRE, QUERY, A, B, base, cut, edited, grown, loaded, rename, save

WRONG: dict[str, tuple[Callable[[dict, dict], Any], tuple[str, ...]]] = {
    "missing": (lambda c, t: (t.pop(A), t.pop(B)), (f"'{A}' of shape (4, 16) is missing", f"'{B}' of shape (16, 4)")),
    "half": (lambda c, t: t.pop(B), ("1 tensor(s)", f"'{B}' of shape (16, 4) is missing", "nothing was loaded")),
    "extra": (
        lambda c, t: t.update({f"{PRE}{QUERY}x.lora_A.weight": t[A], f"{PRE}lm_head.weight": t[B], "q.weight": t[B]}),
        ("3 tensor(s)", f"{QUERY}x.lora_A.weight': the model has no such tensor (closest:", "lm_head.weight'",
         "'q.weight': PEFT's names start with 'base_model.model.'"),
    ),
    "not targeted": (lambda c, t: c.update(target_modules=["value"]), (f"'{QUERY}' has factors", "would ignore")),
    "more targeted": (lambda c, t: c.update(target_modules=["query", "value", "key"]), ("4 tensor(s)", "key.lora_A")),
    "task": (
        lambda c, t: c.update(task_type="SEQ_CLS"),
        ("4 tensor(s)", f"'{PRE}classifier.dense.weight' of shape (16, 16) is missing", "classifier.out_proj.bias"),
    ),
    "bias": (lambda c, t: t.update({f"{PRE}{QUERY[:-5]}key.bias": t[B][:, 0].copy()}), ("neither bias nor modules",)),
    "whole missing": (
        lambda c, t: c.update(bias="all", modules_to_save=["out_proj"]),
        ("classifier.out_proj.weight' of shape (3, 16) is missing", "key.bias' of shape (16,) is missing"),
    ),
    "empty": (lambda c, t: (t.clear(), c.update(target_modules=None)), ("has no tensors",)),
    "twice": (
        lambda c, t: t.update({f"{PRE}{QUERY}{x}.bias": t[B][:, 0].copy() for x in ("", ".base_layer")}),
        (f"{QUERY}.bias' and '{PRE}{QUERY}.base_layer.bias' are one tensor",),
    ),
    "rank": (lambda c, t: c.update(r=3), ("8 tensor(s)", "(4, 16), expected (3, 16): the config gives it rank 3")),
    "shape": (lambda c, t: (cut(t, A, np.s_[:, :9]), cut(t, B, np.s_[1:])), ("(4, 9), expected (4, 16)", "(15, 4)")),
    "integers": (lambda c, t: t.update({A: np.ones((4, 16), np.int32)}), ("is int32, expected floating numbers",)),
    "no magnitude": (lambda c, t: c.update(use_dora=True), ("4 tensor(s)", "lora_magnitude_vector' of shape (16,) is")),
    "magnitude": (
        lambda c, t: t.update({f"{PRE}{QUERY}.lora_magnitude_vector": np.ones(16, np.float32)}), ("no use_dora",),
    ),
    "as embedding": (lambda c, t: rename(t, f"{QUERY}.lora_A.weight", f"{QUERY}.lora_embedding_A"),
                     ("kind 'linear', which has no 'lora_embedding_A'", f"'{A}' of shape (4, 16) is missing")),
    "another model": (lambda c, t: rename(t, "roberta.encoder.layer.1", "model.layers.3"),
                      ("8 tensor(s)", "model.layers.3.attention.self.query.lora_A", "layer.1.attention.self.value")),
    "nan": (lambda c, t: (t[A].fill(np.nan), t[B].fill(np.inf)), ("2 tensor(s) hold NaN", A, B, "Nothing was loaded")),
    "method": (lambda c, t: c.update(peft_type="LOHA"), ("peft_type = 'LOHA'; expected 'LORA'", "merge_and_unload")),
    "features": (
        lambda c, t: c.update(use_qalora=True, layer_replication=[[0, 2]], lora_bias=True, trainable_token_indices=[1],
                              alora_invocation_tokens=[3], megatron_config={"a": 1}, target_parameters=["x"], new=1),
        ("use_qalora = True", "layer_replication", "lora_bias", "trainable_token_indices", "alora_invocation_tokens",
         "megatron_config", "target_parameters", "new = 1"),
    ),
    "empty features": (
        lambda c, t: c.update(kasa_config={}, velora_config={}, monteclora_config={}, use_bdlora={}, new=0, other=""),
        ("kasa_config = {}", "velora_config = {}", "monteclora_config", "use_bdlora = {}", "new = 0", "other = ''"),
    ),
    "prompts": (lambda c, t: c.update(peft_type="PROMPT_TUNING"), ("it cannot be merged; use it in PyTorch",)),
    "init": (lambda c, t: c.update(init_lora_weights="corda"), ("'corda', which changed the base weights", "save_")),
    "values": (
        lambda c, t: c.update(r=0, lora_alpha="8", lora_dropout=1, bias="some", use_dora="yes", target_modules="(",
                              modules_to_save="x", layers_to_transform=["1"], rank_pattern={"q": -1},
                              alpha_pattern={"(": 1}, layers_pattern=3, exclude_modules=7, use_rslora=1),
        ("13 invalid", "r = 0; expected an integer above 0", "lora_alpha = '8'", "lora_dropout = 1", "bias = 'some'",
         "use_dora", "target_modules = '('; expected a list of names or a regular expression", "modules_to_save",
         "layers_to_transform", "rank_pattern", "alpha_pattern", "layers_pattern", "exclude_modules", "use_rslora"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_everything_wrong_is_named(case: str, tmp_path: Path) -> None:
    """The error names each tensor or setting that does not fit, and nothing is loaded."""
    edit, parts = WRONG[case]
    b = base("roberta")
    folder = edited(tmp_path / "it", "plain", edit)
    expect(message(peft.PeftError, lambda: peft.load(folder, b.names, b.params)), *parts)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    """The adapter of a different model gives one readable message."""
    b = base("toy")
    more = {f"{PRE}layers.{i}.lora_A.weight": np.ones((2, 2)) for i in range(50)}
    folder = edited(tmp_path / "it", "toy", lambda c, t: t.update(more))
    text = message(peft.PeftError, lambda: peft.load(folder, b.names, b.params))
    expect(text, "50 tensor(s)", "and 10 more")
    assert text.count("\n") == 42


DAMAGED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (lambda f: (f / ADAPTER_CONFIG).unlink(), (ADAPTER_CONFIG, "No such file")),
    "no tensors": (lambda f: (f / ADAPTER_WEIGHTS).unlink(), ("not a complete safetensors file",)),
    "pickled": (
        lambda f: (f / ADAPTER_WEIGHTS).rename(f / "adapter_model.bin"),
        ("adapter_model.bin, which is pickled", "PeftModel.from_pretrained", "save_pretrained(new_folder)"),
    ),
    "half a config": (lambda f: (f / ADAPTER_CONFIG).write_text('{"r": 8,'), ("cannot be read as JSON",)),
    "a list": (lambda f: (f / ADAPTER_CONFIG).write_text("[1]"), ("expected a JSON object, got list",)),
    "deep": (lambda f: (f / ADAPTER_CONFIG).write_text("[" * 99999), ("cannot be read as JSON",)),
    "truncated": (lambda f: write(f, read(f)[:-9]), ("not a complete safetensors file", "Fetch or export")),
    "header only": (lambda f: write(f, read(f)[:50]), ("not a complete safetensors file",)),
    "absurd header": (lambda f: write(f, struct.pack("<Q", 2**62) + read(f)[8:]), ("not a complete safetensors file",)),
    "overlapping": (
        lambda f: write(f, re.sub(rb'"data_offsets":\[0,', b'"data_offsets":[1,', read(f))), ("not a complete",),
    ),
    "empty": (lambda f: write(f, b""), ("not a complete safetensors file",)),
}  # fmt: skip


def read(folder: Path) -> bytes:
    return (folder / ADAPTER_WEIGHTS).read_bytes()


def write(folder: Path, content: bytes) -> None:
    (folder / ADAPTER_WEIGHTS).write_bytes(content)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    damage, parts = DAMAGED[case]
    folder = edited(tmp_path / "it", "plain", lambda c, t: None)
    damage(folder)
    b = base("roberta")
    expect(message(TensorError, lambda: peft.load(folder, b.names, b.params)), *parts, str(folder))


def test_a_stacked_leaf_is_trained_whole_or_by_factors(tmp_path: Path) -> None:
    """PEFT may train layers in different ways; a stacked leaf that mixes both is refused."""
    b = base("toy")

    def mix(config: dict, tensors: dict) -> None:
        config["modules_to_save"] = ["blocks.1.dense"]
        for part in ("lora_A", "lora_B"):
            del tensors[f"{PRE}blocks.1.dense.{part}.weight"]
        tensors[f"{PRE}blocks.1.dense.weight"] = np.ones((8, 8), np.float32)
        tensors[f"{PRE}blocks.1.dense.bias"] = np.ones(8, np.float32)

    text = message(peft.PeftError, lambda: peft.load(edited(tmp_path / "it", "toy", mix), b.names, b.params))
    expect(text, "1 tensor(s)", "'blocks/dense/kernel': 'blocks.1.dense.weight' is trained whole", "merge_and_unload")


def test_a_head_is_nothing_that_vllm_reads(tmp_path: Path) -> None:
    """A head is stored for the task, trained or not."""
    b, (adapters, config) = base("roberta"), loaded("plain")
    text = message(
        peft.PeftError,
        lambda: peft.save(tmp_path, b.names, b.params, adapters, config, task_type="SEQ_CLS", uniform_rank=True),
    )
    expect(text, "vLLM", "'params/classifier/out_proj/kernel' is stored whole for this task_type", "jlora.merge")


def test_an_id_on_the_hub_is_fetched_first() -> None:
    b = base("toy")
    text = message(peft.PeftError, lambda: peft.load("someone/adapter", b.names, b.params))
    expect(text, "'someone/adapter' is not a folder", "huggingface_hub.snapshot_download('someone/adapter')")


def test_what_peft_has_no_form_for(tmp_path: Path) -> None:
    """Every problem is named, and an adapter in the folder is not replaced."""
    b, (adapters, config) = base("toy"), loaded("toy")
    kept = save(tmp_path, "toy") / ADAPTER_WEIGHTS
    before = kept.read_bytes()

    def failure(adapters: Any, error: type[Exception] = peft.PeftError, **options: Any) -> str:
        return message(error, lambda: peft.save(tmp_path, b.names, b.params, adapters, config, **options))

    head, dense = adapters["head/kernel"], adapters["blocks/dense/kernel"]
    flipped = jlora.LoraFactors(head.b.T, head.a.T, axes=head.axes.flipped())
    bias = jlora.LoraFactors(jnp.zeros((2, 1)), jnp.zeros((2, 1, 8)), axes=jlora.Axes((0,), (), (1,)))
    text = failure(
        {
            "head/kernel": flipped,
            "blocks/dense/bias": bias,
            "blocks/dense/kernel": dataclasses.replace(dense, scale=float("nan")),
        },
        task_type="SEQ_CLASS",
    )
    expect(
        text, "'head/kernel' has Axes(batch=(), inputs=(1,), outputs=(0,)); PEFT adapts 'linear' along", "4 problem(s)"
    )
    expect(
        text, "'blocks/dense/bias' is of kind 'array'", "scale nan", "'SEQ_CLASS' (closest: 'SEQ_CLS'", "was written"
    )
    expect(failure({"head/bias": jnp.zeros(3)}), "no low-rank factors")
    shapes = jax.eval_shape(lambda: b.params)
    both = {"head/kernel": head, "up/bias": jnp.zeros(8), "blocks/norm/bias": jnp.zeros((2, 8))}
    text = message(peft.PeftError, lambda: peft.save(tmp_path, b.names, shapes, both, config))
    expect(text, "the params are shapes", "'up/kernel'", "'blocks/norm/scale'")
    broken = dataclasses.replace(head, a=head.a.at[0, 0].set(jnp.nan))
    expect(
        failure({"head/kernel": broken, "tokens/embedding": adapters["tokens/embedding"]}, ValueError), "'head/kernel'"
    )
    expect(failure({"haed/kernel": head}, KeyError), "haed/kernel", "head/kernel")
    expect(
        message(
            KeyError,
            lambda: peft.save(tmp_path, {"hed": b.names["head/bias"]}, b.params, {"head/kernel": head}, config),
        ),
        "hed",
    )
    assert kept.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_factors_of_a_head_that_peft_trains_whole_alone_are_no_adapter(tmp_path: Path) -> None:
    """They are merged into its weight, which needs values, and then no factors are left."""
    b = base("roberta")
    config = jlora.LoraConfig(2, targets=("classifier/dense/kernel",), exclude=())
    adapters = grown("roberta", config)
    for params, part in ((b.params, "no low-rank factors"), (jax.eval_shape(lambda: b.params), "params are shapes")):
        text = message(
            peft.PeftError,
            lambda p=params: peft.save(tmp_path / "x", b.names, p, adapters, config, task_type="SEQ_CLS"),
        )
        expect(text, part)
    assert not (tmp_path / "x").exists()


def test_missing_tensors_are_named_without_params_too(tmp_path: Path) -> None:
    folder = edited(tmp_path / "x", "plain", lambda c, t: (t.pop(A), t.pop(B)))
    text = message(peft.PeftError, lambda: peft.load(folder, base("roberta").names))
    expect(text, f"'{A}' is missing", f"'{B}' is missing", "nothing was loaded")

"""Adapters of Hugging Face's peft, in both directions: what it wrote computes the same here, and what we write there.

`tests/golden/peft` was written by the real peft. Where peft is installed, it writes them anew, and reads ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden.make_peft import CASES, FOLDER, inputs, torch_base, torch_logits, write_case
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models, names, peft
from jlora._peft_config import PeftConfig, read_config
from jlora._tensors import TensorError

TOLERANCE = 1e-4
EXPECTED = load_file(FOLDER / "expected.safetensors")
every_case = pytest.mark.parametrize("case", CASES)
needs_peft = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")),
    reason="needs torch, transformers and peft",
)


class Base(NamedTuple):
    apply: Callable[..., Any]
    params: Any
    names: names.Names


def toy(params: Any, ids: Any, images: Any) -> Any:
    """`golden.make_peft._toy`, its blocks stacked and scanned."""
    words = params["tokens"]["embedding"][ids].mean(1)
    pictures = jax.lax.conv_general_dilated(
        images, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )
    pictures = jax.nn.relu(pictures + params["conv"]["bias"][:, None, None]).mean((2, 3))
    x = jnp.tanh(jnp.concatenate([words, pictures], 1) @ params["up"]["kernel"] + params["up"]["bias"])

    def block(x: Any, p: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        y = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        y = y * p["norm"]["scale"] + p["norm"]["bias"]
        return x + jnp.tanh(y @ p["dense"]["kernel"] + p["dense"]["bias"]), None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


TOY_NAMES = {
    **names.embedding("tokens", "tokens"),
    **names.conv2d("conv", "conv"),
    **names.conv1d("up", "up"),
    **names.norm("blocks/norm", "blocks.{}.norm", layers=2),
    **names.linear("blocks/dense", "blocks.{}.dense", layers=2),
    **names.linear("head", "head"),
}


@functools.cache
def base(name: str) -> Base:
    """The base of some cases, on our side."""
    if name != "toy":
        model, params = models.load(FOLDER / f"base-{name}")
        return Base(model.apply, params, models.names(model))
    tensors = load_file(FOLDER / "base-toy" / "model.safetensors")
    params: dict[str, Any] = {}
    for path, n in TOY_NAMES.items():
        *above, last = path.split("/")
        node = functools.reduce(lambda d, k: d.setdefault(k, {}), above, params)
        arrays = [names.from_torch(tensors[t], n.kind) for t in n.tensors]
        node[last] = jnp.asarray(np.stack(arrays) if n.stacked else arrays[0])
    return Base(toy, params, TOY_NAMES)


@functools.partial(jax.jit, static_argnums=0)
def plain(name: str, params: Any) -> Any:
    return base(name).apply(params, **inputs(name))


@functools.partial(jax.jit, static_argnums=0)
def adapted(name: str, params: Any, adapters: Any) -> Any:
    return jlora.lora(base(name).apply)(jlora.attach(params, adapters), **inputs(name))


@functools.cache
def loaded(case: str) -> tuple[dict[str, Any], jlora.LoraConfig]:
    b = base(CASES[case].base)
    return peft.load(FOLDER / case, b.names, b.params)


def assert_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Equal adapters, static fields and all, bit for bit."""
    assert list(a) == list(b) and jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def assert_close(got: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=tolerance, atol=tolerance)


def save(folder: Path, case: str, **options: Any) -> Path:
    """What we write of a golden case."""
    b = base(CASES[case].base)
    peft.save(folder, b.params, *loaded(case), b.names, task_type=CASES[case].config.get("task_type"), **options)
    return folder


# ---- what peft wrote


@every_case
def test_an_adapter_of_peft_computes_the_same_here(case: str) -> None:
    """Torch's logits, factored and merged; and it changes them at all."""
    name, (adapters, _) = CASES[case].base, loaded(case)
    assert np.abs(EXPECTED[case] - EXPECTED[f"base-{name}"]).max() > 0.01 or case == "llama-embeddings"
    assert_close(adapted(name, base(name).params, adapters), EXPECTED[case])
    assert_close(plain(name, jlora.merge(base(name).params, adapters)), EXPECTED[case])


@every_case
def test_the_config_makes_such_adapters(case: str) -> None:
    """`init` with the config that `load` returned gives the same paths, shapes and static fields."""
    b, (adapters, config) = base(CASES[case].base), loaded(case)
    uses = jlora.trace(b.apply, b.params, **inputs(CASES[case].base))
    made = jax.eval_shape(lambda: jlora.init(jax.random.key(0), b.params, config, uses))

    def describe(x: Any) -> Any:
        return (x.scale, x.axes, x.dropout) if isinstance(x, jlora.LoraFactors) else None

    assert jax.tree.map(jnp.shape, dict(sorted(made.items()))) == jax.tree.map(jnp.shape, dict(sorted(adapters.items())))
    assert {p: describe(x) for p, x in made.items()} == {p: describe(x) for p, x in adapters.items()}


@every_case
def test_saving_is_the_inverse_of_loading(case: str, tmp_path: Path) -> None:
    """load(save(a)) == a bit for bit; the same bytes each time; and peft's own tensors and settings."""
    b, (adapters, config) = base(CASES[case].base), loaded(case)
    first, second = save(tmp_path / "1", case), save(tmp_path / "2", case)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert sorted(f.name for f in first.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again, again_config = peft.load(first, b.names, b.params)
    assert_same(adapters, again)
    assert dataclasses.asdict(again_config) == dataclasses.asdict(config)

    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (first, FOLDER / case))
    assert not set(ours) - set(theirs)
    for key in ("peft_type", "inference_mode", "init_lora_weights", "use_dora", "bias", "task_type", "revision"):
        assert ours[key] == theirs[key], key
    if case in PARTIAL:  # what stacked leaves fill in is written too
        return
    mine, golden = (load_file(f / "adapter_model.safetensors") for f in (first, FOLDER / case))
    golden = {k: v for k, v in golden.items() if not re.search(r"\.(modules_to_save|original_module)\.", k)}
    assert set(mine) == set(golden)
    if case not in ("llama",):  # layers of unequal ranks and scales
        for key in golden:
            np.testing.assert_array_equal(mine[key], golden[key], key)


PARTIAL = ("llama-layers", "toy-whole")


def test_peft_writes_today_what_the_golden_files_hold(tmp_path: Path) -> None:
    """Names and shapes; the numbers may differ with the version of torch, and are checked against its logits."""
    pytest.importorskip("peft", reason="needs torch, transformers and peft")
    for case, made in CASES.items():
        with quiet():
            expected = write_case(tmp_path / case, made)
        new, golden = (load_file(f / case / "adapter_model.safetensors") for f in (tmp_path, FOLDER))
        assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in golden.items()}
        b = base(made.base)
        adapters, _ = peft.load(tmp_path / case, b.names, b.params)
        assert_close(adapted(made.base, b.params, adapters), expected)


# ---- what peft reads


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of torch, transformers and peft are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def torch_state(name: str) -> Any:
    import torch

    with quiet():
        found = torch_base(name)
        files = load_file(FOLDER / f"base-{name}" / "model.safetensors")
        found.load_state_dict({k: torch.tensor(v) for k, v in files.items()}, strict=False)
    return found


def peft_logits(folder: Path, name: str) -> np.ndarray:
    """What peft computes with an adapter; that it needs no tensor which is missing or ignored is checked too."""
    import copy

    import peft as theirs

    with quiet():
        model = theirs.PeftModel.from_pretrained(copy.deepcopy(torch_state(name)), str(folder)).eval()
        stored = load_file(folder / "adapter_model.safetensors")
        state = theirs.get_peft_model_state_dict(model, save_embedding_layers=False)
        copies = re.compile(r"\.(modules_to_save|original_module)\.")
        assert set(stored) == {k for k in state if not copies.search(k)}
        return torch_logits(model, name)


@needs_peft
@every_case
def test_peft_reads_what_we_write(case: str, tmp_path: Path) -> None:
    name = CASES[case].base
    if case == "llama-embeddings":  # our whole tables become modules_to_save
        assert "embed_tokens" in str(json.loads((save(tmp_path, case) / "adapter_config.json").read_text()))
    assert_close(peft_logits(save(tmp_path, case), name), EXPECTED[case])


@every_case
def test_one_rank_for_all(case: str, tmp_path: Path) -> None:
    """With `uniform_rank` there is one rank, no scale and no pattern, and the same logits, here and there."""
    b, name = base(CASES[case].base), CASES[case].base
    save(tmp_path, case, uniform_rank=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(f.rank for f in factors(loaded(case)[0]).values())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    again, _ = peft.load(tmp_path, b.names, b.params)
    assert {f.scale for f in factors(again).values()} == {1.0}
    assert_close(plain(name, jlora.merge(b.params, again)), EXPECTED[case])
    if importlib.util.find_spec("peft") and case in ("patterns", "llama", "toy-dora"):
        assert_close(peft_logits(tmp_path, name), EXPECTED[case])


def factors(adapters: Mapping[str, Any]) -> dict[str, jlora.LoraFactors]:
    return {path: f for path, f in adapters.items() if isinstance(f, jlora.LoraFactors)}


def grown(name: str, config: jlora.LoraConfig) -> dict[str, Any]:
    """Adapters as if trained: every array is random."""
    b = base(name)
    uses = jlora.trace(b.apply, b.params, **inputs(name))
    leaves, treedef = jax.tree.flatten(jlora.init(jax.random.key(0), b.params, config, uses))
    rng = np.random.default_rng(0)
    return treedef.unflatten([x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves])


LAYER = "encoder/layer_1/"
OURS: dict[str, tuple[str, jlora.LoraConfig, dict[str, Any]]] = {
    "rules": (
        "roberta",
        jlora.LoraConfig(
            3,
            alpha=5,
            targets=("query", "value", "word_embeddings"),
            rules=(jlora.Rule(LAYER + "query", rank=2), jlora.Rule("value", alpha=11), jlora.Rule("word_e", alpha=1)),
            dropout=0.2,
        ),
        {"r": 3, "lora_alpha": 5.0, "rank_pattern": {"1.attention.self.query": 2}, "lora_dropout": 0.2,
         "alpha_pattern": {"value": 11, "word_embeddings": 1}, "target_modules": ["query", "value", "word_embeddings"]},
    ),
    "head half trained": (
        "roberta",
        jlora.LoraConfig(2, targets=(LAYER + "query",), train_also=("classifier/out_proj/kernel", LAYER + "key/bias")),
        {"target_modules": ["1.attention.self.query"], "bias": "none",
         "modules_to_save": ["classifier.out_proj", "roberta.encoder.layer.1.attention.self.key"]},
    ),
    "head untrained": (
        "roberta",
        jlora.LoraConfig(2, targets=("query",), train_also=("layer_0/query/bias",)),
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "bias": "lora_only"},
    ),
    "dora in parts": (
        "toy",
        jlora.LoraConfig(2, targets=("dense/kernel", "conv/kernel", "tokens"), use_dora=True, use_rslora=True,
                         rules=(jlora.Rule("dense", use_dora=False),)),
        {"use_dora": True, "use_rslora": True},
    ),
    "all biases, all blocks": (
        "toy",
        jlora.LoraConfig(2, targets=("up/kernel",), train_also=("bias", "blocks/")),
        {"bias": "all", "modules_to_save": ["blocks.0", "blocks.1"], "fan_in_fan_out": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_adapters_made_here(case: str, tmp_path: Path) -> None:
    """What PEFT stores beyond what was trained comes from the params: the logits are ours, here again and there."""
    name, config, written = OURS[case]
    b, adapters = base(name), grown(name, config)
    peft.save(tmp_path, b.params, adapters, config, b.names, base_model="x/y", task_type=written.get("task_type"))
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    found["rank_pattern"], found["alpha_pattern"] = (
        {key.replace("\\", ""): value for key, value in found[table].items()} for table in ("rank_pattern", "alpha_pattern")
    )
    assert {key: found[key] for key in written} == written and found["base_model_name_or_path"] == "x/y"
    expected = plain(name, jlora.merge(b.params, adapters))
    assert np.abs(np.asarray(expected) - EXPECTED[f"base-{name}"]).max() > 0.01
    again, _ = peft.load(tmp_path, b.names, b.params)
    assert {path: f.scale for path, f in factors(again).items()} == {p: f.scale for p, f in factors(adapters).items()}
    assert_close(plain(name, jlora.merge(b.params, again)), expected)
    if importlib.util.find_spec("peft"):
        assert_close(peft_logits(tmp_path, name), expected)

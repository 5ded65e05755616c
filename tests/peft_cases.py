"""Shared by the tests of PEFT: the golden cases on our side, and edited copies of them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models, peft
from jlora.files import tensor_names as names
from jlora.files.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.golden.make_peft import CASES, FOLDER, inputs

TOLERANCE = 1e-4
EXPECTED = load_file(FOLDER / "expected.safetensors")
every_case = pytest.mark.parametrize("case", CASES)
needs_peft = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")),
    reason="needs torch, transformers and peft",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of torch, transformers and peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Base(NamedTuple):
    apply: Callable[..., Any]
    params: Any
    names: names.TensorNames


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
    """A base of the golden cases on our side."""
    if name != "toy":
        model, params = models.load(FOLDER / f"base-{name}")
        return Base(model.apply, params, models.tensor_names(model))
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
    """Adapters that are equal bit for bit, static fields included."""
    assert list(a) == list(b) and jax.tree.structure(a) == jax.tree.structure(b)
    chex.assert_trees_all_equal_dtypes(a, b)
    chex.assert_trees_all_equal(a, b)


def assert_close(got: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=tolerance, atol=tolerance)


def save(folder: Path, case: str, **options: Any) -> Path:
    """The adapter of a golden case, as we write it."""
    b = base(CASES[case].base)
    peft.save(folder, b.names, b.params, *loaded(case), task_type=CASES[case].config.get("task_type"), **options)
    return folder


PRE = "base_model.model."
WORDS = "roberta.embeddings.word_embeddings"
QUERY = "roberta.encoder.layer.0.attention.self.query"
A, B = f"{PRE}{QUERY}.lora_A.weight", f"{PRE}{QUERY}.lora_B.weight"


def edited(folder: Path, case: str, edit: Callable[[dict, dict], Any]) -> Path:
    """A copy of a golden adapter after ``edit(config, tensors)``."""
    shutil.copytree(FOLDER / case, folder)
    config, tensors = (
        json.loads((folder / ADAPTER_CONFIG).read_text()),
        load_file(folder / ADAPTER_WEIGHTS),
    )
    edit(config, tensors)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    return folder


def cut(tensors: dict, key: str, index: Any) -> None:
    tensors[key] = np.ascontiguousarray(tensors[key][index])


def rename(tensors: dict, old: str, new: str) -> None:
    for key in [k for k in tensors if old in k]:
        tensors[key.replace(old, new)] = tensors.pop(key)


def factors(adapters: Mapping[str, Any]) -> dict[str, jlora.LoraFactors]:
    return {path: f for path, f in adapters.items() if isinstance(f, jlora.LoraFactors)}


def grown(name: str, config: jlora.LoraConfig) -> dict[str, Any]:
    """Adapters as if trained: every array is random."""
    b = base(name)
    uses = jlora.trace(b.apply, b.params, **inputs(name))
    leaves, treedef = jax.tree.flatten(jlora.init(jax.random.key(0), b.params, config, uses))
    rng = np.random.default_rng(0)
    return treedef.unflatten([x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves])

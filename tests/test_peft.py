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
from jlora._peft_config import PeftConfig, exact_alpha, read_config
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

    assert jax.tree.map(jnp.shape, dict(sorted(made.items()))) == jax.tree.map(
        jnp.shape, dict(sorted(adapters.items()))
    )
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
        {key.replace("\\", ""): value for key, value in found[table].items()}
        for table in ("rank_pattern", "alpha_pattern")
    )
    assert {key: found[key] for key in written} == written and found["base_model_name_or_path"] == "x/y"
    expected = plain(name, jlora.merge(b.params, adapters))
    assert np.abs(np.asarray(expected) - EXPECTED[f"base-{name}"]).max() > 0.01
    again, _ = peft.load(tmp_path, b.names, b.params)
    assert {path: f.scale for path, f in factors(again).items()} == {p: f.scale for p, f in factors(adapters).items()}
    assert_close(plain(name, jlora.merge(b.params, again)), expected)
    if importlib.util.find_spec("peft"):
        assert_close(peft_logits(tmp_path, name), expected)


def test_a_scale_that_no_alpha_gives_is_folded(tmp_path: Path) -> None:
    """2.5/5 is a half, but no number divided by 5 is the one above: B is scaled then, and the update stays the same."""
    b = base("toy")
    config = jlora.LoraConfig(5, alpha=2.5, targets=("dense/kernel", "up/kernel"))
    adapters = grown("toy", config)
    odd = next(s for i in range(1, 99) if exact_alpha(s := 0.4 + i * 2**-54, 5, False) is None)
    adapters["up/kernel"] = dataclasses.replace(adapters["up/kernel"], scale=odd)
    peft.save(tmp_path, b.params, adapters, config, b.names)
    again, _ = peft.load(tmp_path, b.names, b.params)
    assert [f.scale for f in factors(again).values()] == [1.0, 0.5]
    assert_close(plain("toy", jlora.merge(b.params, again)), plain("toy", jlora.merge(b.params, adapters)))


def test_alpha_gives_the_scale_back_exactly() -> None:
    """Whatever ranks and alphas were, and integers stay integers."""
    for rank in range(1, 70):
        for alpha in (1, 7, 16, 32, 0.1, 12.7, 1 / 3):
            for rslora in (False, True):
                divisor = rank**0.5 if rslora else rank
                found = exact_alpha(alpha / divisor, rank, rslora)
                assert found is not None and found / divisor == alpha / divisor
                assert type(found) is type(alpha) or type(alpha) is float


def test_dtypes_are_kept(tmp_path: Path) -> None:
    """bfloat16 factors come back as such, and so does the config."""
    b = base("toy")
    config = jlora.LoraConfig(2, targets=("dense/kernel", "tokens"), dtype="bfloat16")
    adapters = grown("toy", config)
    peft.save(tmp_path, b.params, adapters, config, b.names)
    again, found = peft.load(tmp_path, b.names, b.params)
    assert_same(again, {path: adapters[path] for path in again})
    assert found.dtype == "bfloat16"
    assert load_file(tmp_path / "adapter_model.safetensors").popitem()[1].dtype == ml_dtypes.bfloat16


def test_shapes_are_enough(tmp_path: Path) -> None:
    """`load` needs no values of the params, except to fill in a stacked leaf."""
    for case in ("plain", "dora", "llama"):
        b = base(CASES[case].base)
        assert_same(peft.load(FOLDER / case, b.names, jax.eval_shape(lambda b=b: b.params))[0], loaded(case)[0])
    for case, path in (("llama-layers", "model/layers/mlp/down_proj/kernel"), ("toy-whole", "blocks/norm/bias")):
        b = base(CASES[case].base)
        text = message(lambda b=b, case=case: peft.load(FOLDER / case, b.names, jax.eval_shape(lambda: b.params)))
        expect(text, f"{path}': only some of its layers", "give params with values")


# ---- the bare network and one with a head


def test_an_adapter_of_the_bare_network_fits_one_with_a_head_and_back(tmp_path: Path) -> None:
    """The first part of the names may be missing, or too much."""
    bare, params = models.load(FOLDER / "base-roberta", task="features", key=jax.random.key(0))
    less, _ = peft.load(FOLDER / "patterns", models.names(bare), params)
    whole, config = loaded("patterns")
    assert {path.replace("params/", "params/encoder/"): f.scale for path, f in factors(less).items()} == {
        path: f.scale for path, f in factors(whole).items()
    }
    peft.save(tmp_path, params, less, config, models.names(bare))
    b = base("roberta")
    assert_same(peft.load(tmp_path, b.names, b.params)[0], whole)


def test_stored_embeddings_beside_factors_say_nothing_new(tmp_path: Path) -> None:
    """What peft stores of a model whose vocabulary may have changed is read when it did not, tied head included."""

    def store(config: dict, tensors: dict) -> None:
        table = load_file(FOLDER / "base-gpt2" / "model.safetensors")["transformer.wte.weight"]
        tensors |= {PRE + "transformer.wte.weight": table + 1, PRE + "lm_head.weight": table + 1}

    b = base("gpt2")
    adapters: dict[str, Any] = peft.load(edited(tmp_path / "1", "gpt2", store), b.names, b.params)[0]
    np.testing.assert_allclose(
        adapters["params/transformer/wte/embedding"] - 1,
        b.params["params"]["transformer"]["wte"]["embedding"],
        atol=1e-6,
    )

    def beside(config: dict, tensors: dict) -> None:
        table = load_file(FOLDER / "base-roberta" / "model.safetensors")[f"{WORDS}.weight"]
        tensors[f"{PRE}{WORDS}.base_layer.weight"] = table

    b = base("roberta")
    assert_same(peft.load(edited(tmp_path / "2", "dora", beside), b.names, b.params)[0], loaded("dora")[0])


# ---- what cannot be


PRE = "base_model.model."
WORDS = "roberta.embeddings.word_embeddings"
QUERY = "roberta.encoder.layer.0.attention.self.query"
A, B = f"{PRE}{QUERY}.lora_A.weight", f"{PRE}{QUERY}.lora_B.weight"


def message(call: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def expect(text: str, *parts: str) -> None:
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in:\n{text}"


def edited(folder: Path, case: str, edit: Callable[[dict, dict], Any]) -> Path:
    """A copy of a golden adapter after ``edit(config, tensors)``."""
    shutil.copytree(FOLDER / case, folder)
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def cut(tensors: dict, key: str, index: Any) -> None:
    tensors[key] = np.ascontiguousarray(tensors[key][index])


def rename(tensors: dict, old: str, new: str) -> None:
    for key in [k for k in tensors if old in k]:
        tensors[key.replace(old, new)] = tensors.pop(key)


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
    "bias": (lambda c, t: t.update({f"{PRE}{QUERY[:-5]}key.bias": t[B][:, 0].copy()}), ("neither bias nor modules",)),
    "whole missing": (
        lambda c, t: c.update(bias="all", modules_to_save=["out_proj"]),
        ("classifier.out_proj.weight' of shape (3, 16) is missing", "key.bias' of shape (16,) is missing"),
    ),
    "empty": (lambda c, t: (t.clear(), c.update(target_modules=None)), ("holds no tensor at all",)),
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
    "init": (lambda c, t: c.update(init_lora_weights="pissa"), ("'pissa', which changed the base weights", "save_")),
    "values": (
        lambda c, t: c.update(r=0, lora_alpha="8", lora_dropout=1, bias="some", use_dora="yes", target_modules="(",
                              modules_to_save="x", layers_to_transform=["1"], rank_pattern={"q": -1},
                              alpha_pattern={"(": 1}, layers_pattern=3, exclude_modules=7, use_rslora=1),
        ("13 value(s)", "r = 0; expected an integer above 0", "lora_alpha = '8'", "lora_dropout = 1", "bias = 'some'",
         "use_dora", "target_modules = '('; expected a list of names or a regular expression", "modules_to_save",
         "layers_to_transform", "rank_pattern", "alpha_pattern", "layers_pattern", "exclude_modules", "use_rslora"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_everything_wrong_is_named(case: str, tmp_path: Path) -> None:
    """Whatever does not fit is an error that names each tensor or setting, and nothing is loaded."""
    edit, parts = WRONG[case]
    b = base("roberta")
    folder = edited(tmp_path / "it", "plain", edit)
    expect(message(lambda: peft.load(folder, b.names, b.params), peft.PeftError), *parts)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    """A wholly different model's adapter is one message that can be read."""
    b = base("toy")
    more = {f"{PRE}layers.{i}.lora_A.weight": np.ones((2, 2)) for i in range(50)}
    folder = edited(tmp_path / "it", "toy", lambda c, t: t.update(more))
    text = message(lambda: peft.load(folder, b.names, b.params), peft.PeftError)
    expect(text, "50 tensor(s)", "and 10 more")
    assert text.count("\n") == 42


DAMAGED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ("adapter_config.json", "No such file")),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), ("is no whole safetensors file",)),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        ("adapter_model.bin, which is pickled", "PeftModel.from_pretrained", "save_pretrained(new_folder)"),
    ),
    "half a config": (lambda f: (f / "adapter_config.json").write_text('{"r": 8,'), ("cannot be read as JSON",)),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), ("expected a JSON object, got list",)),
    "deep": (lambda f: (f / "adapter_config.json").write_text("[" * 99999), ("cannot be read as JSON",)),
    "truncated": (lambda f: write(f, read(f)[:-9]), ("is no whole safetensors file", "fetch or export it again")),
    "header only": (lambda f: write(f, read(f)[:50]), ("is no whole safetensors file",)),
    "absurd header": (lambda f: write(f, struct.pack("<Q", 2**62) + read(f)[8:]), ("is no whole safetensors file",)),
    "overlapping": (
        lambda f: write(f, re.sub(rb'"data_offsets":\[0,', b'"data_offsets":[1,', read(f))), ("is no whole safetens",),
    ),
    "empty": (lambda f: write(f, b""), ("is no whole safetensors file",)),
}  # fmt: skip


def read(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def write(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    damage, parts = DAMAGED[case]
    folder = edited(tmp_path / "it", "plain", lambda c, t: None)
    damage(folder)
    b = base("roberta")
    expect(message(lambda: peft.load(folder, b.names, b.params), TensorError), *parts, str(folder))


def test_an_id_on_the_hub_is_fetched_first() -> None:
    b = base("toy")
    text = message(lambda: peft.load("someone/adapter", b.names, b.params), peft.PeftError)
    expect(text, "'someone/adapter' is no folder", "huggingface_hub.snapshot_download('someone/adapter')")


def test_what_peft_has_no_form_for(tmp_path: Path) -> None:
    """All of it is named, and an adapter that was there stays."""
    b, (adapters, config) = base("toy"), loaded("toy")
    kept = save(tmp_path, "toy") / "adapter_model.safetensors"
    before = kept.read_bytes()

    def failure(adapters: Any, error: type[Exception] = peft.PeftError, **options: Any) -> str:
        return message(lambda: peft.save(tmp_path, b.params, adapters, config, b.names, **options), error)

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
        text, "'head/kernel' has Axes(batch=(), inputs=(1,), outputs=(0,)); PEFT adapts 'linear' along", "4 thing(s)"
    )
    expect(
        text, "'blocks/dense/bias' is of kind 'array'", "scale nan", "'SEQ_CLASS' (closest: 'SEQ_CLS'", "was written"
    )
    expect(failure({"head/bias": jnp.zeros(3)}), "no low-rank factors")
    shapes = jax.eval_shape(lambda: b.params)
    both = {"head/kernel": head, "up/bias": jnp.zeros(8), "blocks/norm/bias": jnp.zeros((2, 8))}
    text = message(lambda: peft.save(tmp_path, shapes, both, config, b.names), peft.PeftError)
    expect(text, "the params are shapes", "'up/kernel'", "'blocks/norm/scale'")
    broken = dataclasses.replace(head, a=head.a.at[0, 0].set(jnp.nan))
    expect(
        failure({"head/kernel": broken, "tokens/embedding": adapters["tokens/embedding"]}, ValueError), "'head/kernel'"
    )
    expect(failure({"haed/kernel": head}, KeyError), "haed/kernel", "head/kernel")
    expect(
        message(
            lambda: peft.save(tmp_path, b.params, {"head/kernel": head}, config, {"hed": b.names["head/bias"]}),
            KeyError,
        ),
        "hed",
    )
    assert kept.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_head_that_peft_would_train_whole_cannot_have_factors(tmp_path: Path) -> None:
    b = base("roberta")
    config = jlora.LoraConfig(2, targets=("classifier/dense/kernel",), exclude=())
    adapters = grown("roberta", config)
    text = message(
        lambda: peft.save(tmp_path / "x", b.params, adapters, config, b.names, task_type="SEQ_CLS"), peft.PeftError
    )
    expect(text, "'classifier.dense' has factors and lies in a module that is trained whole: ('classifier',)")
    assert not (tmp_path / "x").exists()


# ---- peft's own matching


MATCHING = (
    {"target_modules": ["query", "output.dense"]},
    {"target_modules": ["query"], "exclude_modules": ["layer.1.attention.self.query"]},
    {"target_modules": r".*\.(key|value)", "exclude_modules": r".*0.*"},
    {"target_modules": ["dense"], "layers_to_transform": [0, 2]},
    {"target_modules": ["dense", "classifier.dense"], "layers_to_transform": 1},
    {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
    {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": ["h", "encoder.layer"]},
    {"target_modules": ["dense"], "modules_to_save": ["classifier", "output"]},
    {"target_modules": "dense"},
    {"target_modules": ["self"]},
    {
        "target_modules": ["key"],
        "rank_pattern": {"key": 2, "layer.1.attention.self.key": 3},
        "alpha_pattern": {"ey": 5},
    },
    {"target_modules": ["key"], "rank_pattern": {"layer.[01].*": 2, "query|value": 3}, "alpha_pattern": {"^key": 5}},
    {"target_modules": ["key"], "alpha_pattern": {r".*\.1\..*": 5, "self.query": 6}, "use_rslora": True, "r": 3},
)


@needs_peft
@pytest.mark.parametrize("fields", MATCHING, ids=str)
def test_modules_are_matched_as_peft_matches_them(fields: dict[str, Any], tmp_path: Path) -> None:
    """Targets, ranks and alphas of every module are those that peft's own functions give."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    theirs = LoraConfig(**fields)
    theirs.save_pretrained(str(tmp_path))
    ranks, alphas = theirs.rank_pattern or {}, theirs.alpha_pattern or {}
    ours: PeftConfig = read_config(tmp_path / "adapter_config.json")
    for path, name in base("roberta").names.items():
        if name.kind == "array":
            continue
        module = name.tensors[0].removesuffix(".weight")
        found = check_target_module_exists(theirs, module)
        assert ours.targets(module, name.kind) == bool(found), (path, found)
        rank = ranks.get(get_pattern_key(list(ranks), module), theirs.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), theirs.lora_alpha)
        assert (ours.rank(module), ours.scale(module)) == (rank, alpha / (rank**0.5 if theirs.use_rslora else rank))


def test_all_linear_leaves_heads_out(tmp_path: Path) -> None:
    """A config that says so itself is read as the list that peft makes of it."""
    b = base("llama")
    folder = edited(tmp_path / "it", "llama", lambda c, t: c.update(target_modules="all-linear"))
    assert_same(peft.load(folder, b.names, b.params)[0], loaded("llama")[0])

"""Tied embeddings: one leaf here, two modules in PEFT, the same logits."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file

import jlora
from jlora import models, named_leaves, peft
from jlora.files import tensor_names
from jlora.files.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.golden.make_peft import FOLDER
from tests.messages import expect, message
from tests.peft_cases import assert_close, assert_same, needs_peft, quiet
from tests.small_checkpoints import change

SMALL = {"vocab_size": 32, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2}
LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    **SMALL,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, **SMALL},
    "gemma2": LLAMA,
    "qwen2": {name: value for name, value in LLAMA.items() if name != "head_dim"},
}
CLASSES = {"llama": "Llama", "gpt2": "GPT2", "gemma2": "Gemma2", "qwen2": "Qwen2"}
IDS = np.arange(12).reshape(2, 6)
TABLE = {kind: "wte" if kind == "gpt2" else "embed_tokens" for kind in CONFIGS}
QUERY = {kind: "c_attn" if kind == "gpt2" else "q_proj" for kind in CONFIGS}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def draw(kind: str, folder: Path) -> Path:
    """A tied checkpoint of random weights, written here."""
    model = models.build({"model_type": kind, "architectures": [f"{CLASSES[kind]}ForCausalLM"], **CONFIGS[kind]})
    leaves, treedef = named_leaves(models.abstract(model))
    rng = np.random.default_rng(0)
    params = treedef.unflatten([jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32) for x in leaves.values()])
    models.save(folder, model, params)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: draw(kind, tmp_path_factory.mktemp(kind)) for kind in CONFIGS}


@functools.cache
def network(folder: Path, untie: bool) -> tuple[Any, Any]:
    return models.load(folder, untie=untie)


@functools.cache
def compiled(folder: Path, untie: bool) -> Any:
    model, _ = network(folder, untie)
    return jax.jit(lambda tree: jlora.lora(model.apply)(tree, IDS))


def logits(folder: Path, untie: bool, adapters: Any) -> Any:
    """Our logits, with adapters merged."""
    return compiled(folder, untie)(jlora.merge(network(folder, untie)[1], adapters))


def table_of(kind: str) -> str:
    return f"params/{'transformer' if kind == 'gpt2' else 'model'}/{TABLE[kind]}/embedding"


def grown(folder: Path, kind: str, untie: bool, config: jlora.LoraConfig) -> dict[str, Any]:
    """Adapters as if trained: every array is random."""
    model, params = network(folder, untie)
    uses = jlora.trace(model.apply, params, IDS)
    leaves, treedef = jax.tree.flatten(jlora.init(jax.random.key(0), params, config, uses))
    rng = np.random.default_rng(0)
    return treedef.unflatten([x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves])


# ---- checkpoints


@pytest.mark.sampled(2)
@every_kind
def test_an_untied_network_computes_the_same(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """It has one more leaf, the transposed table, and both are saved and loaded."""
    folder = checkpoints[kind]
    (tied, params), (untied, more) = network(folder, False), network(folder, True)
    leaves, extra = (named_leaves(tree)[0] for tree in (params, more))
    assert set(extra) - set(leaves) == {"params/lm_head/kernel"}
    np.testing.assert_array_equal(extra["params/lm_head/kernel"], leaves[table_of(kind)].T)
    assert jax.tree.map(jnp.shape, more) == jax.tree.map(jnp.shape, models.abstract(models.build(folder, untie=True)))
    assert_close(jax.jit(untied.apply)(more, IDS), jax.jit(tied.apply)(params, IDS), 1e-5)
    models.save(tmp_path, untied, more)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again, read = models.load(tmp_path)
    assert again == untied
    chex.assert_trees_all_equal(read, more)


@every_kind
def test_a_projection_of_other_values_is_not_dropped(kind: str, tmp_path: Path) -> None:
    """It is refused by name, or loaded with ``untie``; a file with the projection alone uses it as the table too."""
    folder = draw(kind, tmp_path)
    head = np.random.default_rng(1).normal(0, 0.3, (32, 16)).astype(np.float32)
    (table,) = (name for name in load_file(folder / "model.safetensors") if TABLE[kind] in name)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    text = message(models.ModelError, lambda: models.load(folder))
    expect(text, "'lm_head.weight'", repr(table), "tie_word_embeddings", "untie=True", "1 tensor(s)")
    _, params = models.load(folder, untie=True)
    np.testing.assert_array_equal(params["params"]["lm_head"]["kernel"], head.T)
    change(folder, lambda tensors: tensors.pop(table) is None)
    for untie in (False, True):
        np.testing.assert_array_equal(named_leaves(models.load(folder, untie=untie)[1])[0][table_of(kind)], head)


def test_a_large_projection_is_compared_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A difference in the last row counts; equal values of another dtype do not differ."""
    monkeypatch.setattr("jlora.models._reading.CHUNK_BYTES", 200)
    folder = draw("llama", tmp_path)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lambda tensors: tensors.update({"lm_head.weight": table.astype(np.float64)}))
    models.load(folder)
    other = table.copy()
    other[-1, -1] += 1
    change(folder, lambda tensors: tensors.update({"lm_head.weight": other}))
    message(models.ModelError, lambda: models.load(folder))
    change(folder, lambda tensors: tensors.update({"lm_head.weight": table[:-1].copy()}))
    message(models.ModelError, lambda: models.load(folder))
    expect(message(models.ModelError, lambda: models.load(folder, untie=True)), "(31, 16), expected (32, 16)")


def test_only_a_language_model_has_a_projection_to_untie(checkpoints: dict[str, Path]) -> None:
    text = message(
        models.ModelError, lambda: models.build(checkpoints["llama"], task="sequence-classification", untie=True)
    )
    expect(text, "untie", "'sequence-classification'")


def test_an_untied_network_is_read_into_its_shards(checkpoints: dict[str, Path]) -> None:
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    model = models.build(checkpoints["llama"], untie=True)
    places = jlora.shardings(models.abstract(model), mesh, models.sharding_rules(model))
    _, params = models.load(checkpoints["llama"], untie=True, shardings=places)
    head = params["params"]["lm_head"]["kernel"]
    assert head.sharding == places["params"]["lm_head"]["kernel"] and not head.sharding.is_fully_replicated
    chex.assert_trees_all_equal(params, network(checkpoints["llama"], True)[1])


# ---- adapters, without PEFT


@pytest.mark.sampled(4)
@every_kind
@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_of_both_uses_is_written_for_both(
    kind: str, whole: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Two modules in the file; one leaf again in the tied network, two in the untied one, and the same logits."""
    folder = checkpoints[kind]
    targets = (QUERY[kind],) if whole else (QUERY[kind], TABLE[kind])
    config = jlora.LoraConfig(2, alpha=3, targets=targets, train_also=(TABLE[kind],) if whole else ())
    adapters = grown(folder, kind, False, config)
    model, params = network(folder, False)
    peft.save(tmp_path, models.tensor_names(model), params, adapters, config)
    stored = {key for key in load_file(tmp_path / ADAPTER_WEIGHTS) if "lm_head" in key}
    parts = ("weight",) if whole else ("lora_A.weight", "lora_B.weight")
    assert stored == {f"base_model.model.lm_head.{part}" for part in parts}
    again, _ = peft.load(tmp_path, models.tensor_names(model), params)
    assert_same(again, {path: adapters[path] for path in again})
    assert set(again) == set(adapters)
    untied, more = network(folder, True)
    two, _ = peft.load(tmp_path, models.tensor_names(untied), more)
    assert set(two) == {*adapters, "params/lm_head/kernel"}
    assert_close(logits(folder, True, two), logits(folder, False, adapters), 1e-5)


FACTORS = "factors of scale 1.0"
APART: dict[str, tuple[dict[str, Any], str]] = {
    "lookup": ({"targets": ("embed_tokens",)}, f"{FACTORS} for the lookup, nothing for 'lm_head.weight'"),
    "projection": ({"targets": ("lm_head",)}, f"nothing for the lookup, {FACTORS} for 'lm_head.weight'"),
    "both": ({"targets": ("lm_head", "embed_tokens")}, f"{FACTORS} for the lookup, {FACTORS} for 'lm_head.weight'"),
    "dora": ({"targets": ("lm_head", "embed_tokens"), "use_dora": True}, f"{FACTORS} with a magnitude for the lookup"),
    "one whole": (
        {"targets": ("lm_head",), "train_also": ("embed_tokens",)},
        f"a weight trained whole for the lookup, {FACTORS}",
    ),
    "both whole": (
        {"targets": ("q_proj",), "train_also": ("embed_tokens", "lm_head")},
        "a weight trained whole for the lookup, a weight trained whole for",
    ),
}


@pytest.mark.parametrize("case", APART)
def test_what_trains_the_two_apart_needs_two_leaves(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Refused by leaf in the tied network, with the way out; the untied one is that way, and loads what it saved."""
    folder, (fields, part) = checkpoints["llama"], APART[case]
    config = jlora.LoraConfig(2, alpha=2, exclude=(), **fields)
    adapters = grown(folder, "llama", True, config)
    untied, more = network(folder, True)
    peft.save(tmp_path, models.tensor_names(untied), more, adapters, config)
    tied, params = network(folder, False)
    for given in (params, None):
        text = message(peft.PeftError, lambda given=given: peft.load(tmp_path, models.tensor_names(tied), given))
        expect(text, f"'{table_of('llama')}'", part, "models.load(path, untie=True)", "Nothing was loaded")
    again, _ = peft.load(tmp_path, models.tensor_names(untied), more)
    assert_same(again, {path: adapters[path] for path in again})
    assert set(again) == set(adapters)


def test_dora_of_a_tied_table_has_no_form(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Its magnitude is by columns in both uses; that of PEFT's projection is by rows. DoRA elsewhere is fine."""
    folder = checkpoints["llama"]
    model, params = network(folder, False)
    config = jlora.LoraConfig(2, targets=("q_proj", "embed_tokens"), use_dora=True)
    adapters = grown(folder, "llama", False, config)
    text = message(peft.PeftError, lambda: peft.save(tmp_path, models.tensor_names(model), params, adapters, config))
    expect(text, f"'{table_of('llama')}' has DoRA", "'lm_head.weight'", "merge")
    plain = jlora.LoraConfig(
        2, targets=config.targets, use_dora=True, overrides=(jlora.Override("embed_tokens", use_dora=False),)
    )
    adapters = grown(folder, "llama", False, plain)
    peft.save(tmp_path, models.tensor_names(model), params, adapters, plain)
    untied, more = network(folder, True)
    two, _ = peft.load(tmp_path, models.tensor_names(untied), more)
    assert_close(logits(folder, True, two), logits(folder, False, adapters), 1e-5)


def test_a_tied_model_of_ones_own(tmp_path: Path) -> None:
    """A name table of one's own declares it with ``tied``."""
    table = {**tensor_names.embedding("table", "tokens", tied="out"), **tensor_names.linear("up", "up")}
    params = {"table": {"embedding": jnp.ones((5, 3))}, "up": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}

    def apply(params: Any, ids: Any) -> Any:
        x = params["table"]["embedding"][ids] @ params["up"]["kernel"] + params["up"]["bias"]
        return x @ params["table"]["embedding"].T

    config = jlora.LoraConfig(2, targets=("table", "up"))
    adapters = jlora.init(jax.random.key(0), params, config, jlora.trace(apply, params, jnp.arange(3)))
    peft.save(tmp_path, table, params, adapters, config)
    assert {key.split(".lora")[0] for key in load_file(tmp_path / ADAPTER_WEIGHTS)} == {
        f"base_model.model.{module}" for module in ("tokens", "out", "up")
    }
    assert_same(peft.load(tmp_path, table, params)[0], {path: adapters[path] for path in table if path in adapters})


# ---- adapters, against PEFT


def theirs_of(kind: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, CLASSES[kind] + ("LMHeadModel" if kind == "gpt2" else "ForCausalLM")).from_pretrained(
        folder
    )


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


@needs_peft
@every_kind
def test_a_projection_of_other_values_is_computed_as_in_transformers(kind: str, tmp_path: Path) -> None:
    folder = draw(kind, tmp_path / "base")
    head = np.random.default_rng(1).normal(0, 0.3, (32, 16)).astype(np.float32)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    with quiet():
        expected = torch_logits(theirs_of(kind, folder))
        model, params = models.load(folder, untie=True)
        assert_close(jax.jit(model.apply)(params, IDS), expected)
        models.export(tmp_path / "merged", model, params, {})
        assert_close(torch_logits(theirs_of(kind, tmp_path / "merged")), expected)


def live(kind: str) -> dict[str, dict[str, Any]]:
    """Configs for a tied pair in PEFT; the names of those that train both alike begin with "both"."""
    table, query, ties = TABLE[kind], QUERY[kind], {"ensure_weight_tying": True}
    cases: dict[str, dict[str, Any]] = {
        "lookup": {"target_modules": [table]},
        "lookup by regex": {"target_modules": rf".*\.{table}"},
        "projection": {"target_modules": [query, "lm_head"], "use_dora": True},
        "apart": {"target_modules": [table, "lm_head"]},
        "lookup whole": {"target_modules": [query], "modules_to_save": [table]},
        "projection whole": {"target_modules": [query], "modules_to_save": ["lm_head"]},
        "one of each": {"target_modules": [query, "lm_head"], "modules_to_save": [table]},
    }
    if kind == "gpt2":  # PEFT does not know that ``wte`` is the embedding
        return cases | {"no effect": {"target_modules": [table], **ties}}
    return cases | {
        "both by factors": {"target_modules": [table], **ties},
        "both by regex": {"target_modules": f".*{table}", **ties},
        "no effect of a regex": {"target_modules": rf".*\.{table}", **ties},
        "both from the projection": {"target_modules": ["lm_head"], **ties},
        "both whole": {"target_modules": [query], "modules_to_save": [table], **ties},
        "apart after all": {"target_modules": [table], "use_dora": True, **ties},
    }


@pytest.mark.sampled(1)
@needs_peft
@every_kind
def test_peft_and_we_agree_on_tied_pairs(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's adapters are exact or refused in the tied network, exact in the untied one; so are ours in PEFT."""
    import peft as theirs
    import torch

    folder = checkpoints[kind]
    for case, fields in live(kind).items():
        with quiet():
            asked = theirs.LoraConfig(r=2, **fields)
            model = theirs.get_peft_model(theirs_of(kind, folder), asked)
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(str(tmp_path / case))
            expected = torch_logits(model)
        for untie in (False, True):
            network_, params = network(folder, untie)
            table = models.tensor_names(network_)
            if not untie and not case.startswith("both"):
                text = message(peft.PeftError, lambda t=table, p=params, c=case: peft.load(tmp_path / c, t, p))
                expect(text, f"'{table_of(kind)}'", "untie=True")
                continue
            adapters, config = peft.load(tmp_path / case, table, params)
            assert_close(logits(folder, untie, adapters), expected)
            assert_close(compiled(folder, untie)(jlora.attach(params, adapters)), expected)
            peft.save(tmp_path / "ours", table, params, adapters, config)
            with quiet():
                back = theirs.PeftModel.from_pretrained(theirs_of(kind, folder), str(tmp_path / "ours"))
                assert_close(torch_logits(back), expected)


def test_ties_that_peft_would_not_carry_out(tmp_path: Path) -> None:
    """PEFT recognizes an embedding by its name, and ``wte`` is not a name that it knows."""
    model, params = models.load(FOLDER / "base-gpt2")
    config = jlora.LoraConfig(2, targets=("wte",))
    adapters = jlora.init(jax.random.key(0), params, config, jlora.trace(model.apply, params, IDS))
    peft.save(tmp_path, models.tensor_names(model), params, adapters, config)
    written = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert sorted(written["target_modules"]) == ["lm_head", "wte"] and "ensure_weight_tying" not in written
    written |= {"target_modules": ["transformer.wte"], "ensure_weight_tying": True}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(written))
    text = message(peft.PeftError, lambda: peft.load(tmp_path, models.tensor_names(model), params))
    expect(text, "'lm_head' has factors, but target_modules does not name it")

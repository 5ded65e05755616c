"""Adapters in PEFT's format, in both directions: what peft writes computes the same here, and what we write computes
the same there.

`tests/golden/peft` was written by the real peft. Where peft is installed, it writes them anew, and reads ours.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import models, peft
from jlora.files.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jlora.peft.config import exact_alpha
from tests.golden.make_peft import CASES, FOLDER, inputs, torch_base, torch_logits, write_case
from tests.messages import expect, message
from tests.peft_cases import (
    EXPECTED,
    PRE,
    WORDS,
    A,
    adapted,
    assert_close,
    assert_same,
    base,
    edited,
    every_case,
    factors,
    grown,
    loaded,
    needs_peft,
    plain,
    quiet,
    save,
)

# ---- what peft wrote


@pytest.mark.sampled(6)
@every_case
def test_an_adapter_of_peft_computes_the_same_here(case: str) -> None:
    """The logits of PyTorch, factored and merged; and they differ from those of the base."""
    name, (adapters, _) = CASES[case].base, loaded(case)
    assert np.abs(EXPECTED[case] - EXPECTED[f"base-{name}"]).max() > 0.01 or case == "llama-embeddings"
    assert_close(adapted(name, base(name).params, adapters), EXPECTED[case])
    assert_close(plain(name, jlora.merge(base(name).params, adapters)), EXPECTED[case])


@every_case
def test_names_are_enough_where_the_adapter_covers_its_leaves(case: str) -> None:
    """Without params the file determines the shapes: the same adapters, or an error that asks for values."""
    try:
        found, config = peft.load(FOLDER / case, base(CASES[case].base).names)
    except peft.PeftError as error:
        assert "pass params with values" in str(error) or "is not the base's value" in str(error)
    else:
        assert_same(found, loaded(case)[0])
        assert config == loaded(case)[1]


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
    """load(save(a)) == a bit for bit; the same bytes each time; peft's own tensors and settings."""
    b, (adapters, config) = base(CASES[case].base), loaded(case)
    first, second = save(tmp_path / "1", case), save(tmp_path / "2", case)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert sorted(f.name for f in first.iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    again, again_config = peft.load(first, b.names, b.params)
    assert_same(adapters, again)
    assert dataclasses.asdict(again_config) == dataclasses.asdict(config)

    ours, theirs = (json.loads((f / ADAPTER_CONFIG).read_text()) for f in (first, FOLDER / case))
    assert not set(ours) - set(theirs)
    for key in ("peft_type", "inference_mode", "init_lora_weights", "use_dora", "bias", "task_type", "revision"):
        assert ours[key] == theirs[key], key
    if case in PARTIAL:  # zeros for layers without an adapter are written too
        return
    mine, golden = (load_file(f / ADAPTER_WEIGHTS) for f in (first, FOLDER / case))
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
        new, golden = (load_file(f / case / ADAPTER_WEIGHTS) for f in (tmp_path, FOLDER))
        assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in golden.items()}
        b = base(made.base)
        adapters, _ = peft.load(tmp_path / case, b.names, b.params)
        assert_close(adapted(made.base, b.params, adapters), expected)


# ---- what peft reads


@functools.cache
def torch_state(name: str) -> Any:
    import torch

    with quiet():
        found = torch_base(name)
        files = load_file(FOLDER / f"base-{name}" / "model.safetensors")
        found.load_state_dict({k: torch.tensor(v) for k, v in files.items()}, strict=False)
    return found


def peft_logits(folder: Path, name: str) -> np.ndarray:
    """The logits of peft with an adapter; checks that no tensor of the file is missing or ignored."""
    import copy

    import peft as theirs

    with quiet():
        model = theirs.PeftModel.from_pretrained(copy.deepcopy(torch_state(name)), str(folder)).eval()
        stored = load_file(folder / ADAPTER_WEIGHTS)
        state = theirs.get_peft_model_state_dict(model, save_embedding_layers=False)
        copies = re.compile(r"\.(modules_to_save|original_module)\.")
        assert set(stored) == {k for k in state if not copies.search(k)}
        return torch_logits(model, name)


@needs_peft
@every_case
def test_peft_reads_what_we_write(case: str, tmp_path: Path) -> None:
    name = CASES[case].base
    if case == "llama-embeddings":  # our whole tables become modules_to_save
        assert "embed_tokens" in str(json.loads((save(tmp_path, case) / ADAPTER_CONFIG).read_text()))
    assert_close(peft_logits(save(tmp_path, case), name), EXPECTED[case])


@every_case
def test_one_rank_for_all(case: str, tmp_path: Path) -> None:
    """With `uniform_rank` there are plain factors of one rank, no scale and no pattern, and the same logits.

    What vLLM's `PEFTHelper` refuses is refused here, by leaf.
    """
    b, name = base(CASES[case].base), CASES[case].base
    adapters, fields = loaded(case)[0], CASES[case].config
    more = {path: "is trained whole" for path in adapters.keys() - factors(adapters).keys()}
    more |= {path: "has DoRA" for path, f in factors(adapters).items() if f.magnitude is not None}
    more |= {"conv/kernel": "is a convolution"} if case == "toy" else {}
    if more:
        text = message(peft.PeftError, lambda: save(tmp_path, case, uniform_rank=True))
        expect(text, "vLLM", "merge", *(f"'{path}' {why}" for path, why in more.items()))
        assert not list(tmp_path.iterdir())
        return
    assert not {"modules_to_save", "use_dora", "bias"} & fields.keys()
    save(tmp_path, case, uniform_rank=True)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == max(f.rank for f in factors(loaded(case)[0]).values())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert (config["modules_to_save"], config["bias"], config["use_dora"]) == (None, "none", False)
    assert all(re.search(r"\.lora_(A|B)\.weight$", key) for key in load_file(tmp_path / ADAPTER_WEIGHTS))
    again, _ = peft.load(tmp_path, b.names, b.params)
    assert {f.scale for f in factors(again).values()} == {1.0}
    assert_close(plain(name, jlora.merge(b.params, again)), EXPECTED[case])
    if importlib.util.find_spec("peft"):
        assert_close(peft_logits(tmp_path, name), EXPECTED[case])


LAYER = "encoder/layer_1/"
OURS: dict[str, tuple[str, jlora.LoraConfig, dict[str, Any]]] = {
    "overrides": (
        "roberta",
        jlora.LoraConfig(
            3,
            alpha=5,
            targets=("query", "value", "word_embeddings"),
            overrides=(
                jlora.Override(LAYER + "query", rank=2),
                jlora.Override("value", alpha=11),
                jlora.Override("word_e", alpha=1),
            ),
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
                         overrides=(jlora.Override("dense", use_dora=False),)),
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
    """What PEFT stores beyond what was trained comes from the params: the logits are the same here and in PEFT."""
    name, config, written = OURS[case]
    b, adapters = base(name), grown(name, config)
    peft.save(tmp_path, b.names, b.params, adapters, config, base_model="x/y", task_type=written.get("task_type"))
    found = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
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
    peft.save(tmp_path, b.names, b.params, adapters, config)
    again, _ = peft.load(tmp_path, b.names, b.params)
    assert [f.scale for f in factors(again).values()] == [1.0, 0.5]
    assert_close(plain("toy", jlora.merge(b.params, again)), plain("toy", jlora.merge(b.params, adapters)))


def test_folding_a_scale_rounds_nothing(tmp_path: Path) -> None:
    """A bfloat16 B times the scale is stored in float32 where bfloat16 does not hold the product, both ways."""
    b = base("toy")
    config = jlora.LoraConfig(3, alpha=4, targets=("dense", "up/kernel"), dtype="bfloat16")
    config = dataclasses.replace(config, overrides=(jlora.Override("up", alpha=6.0),))
    adapters = grown("toy", config)
    peft.save(tmp_path / "1", b.names, b.params, adapters, config, uniform_rank=True)
    stored = {key.split(".")[-3] + key[-8]: x for key, x in load_file(tmp_path / "1" / ADAPTER_WEIGHTS).items()}
    assert {name: str(x.dtype) for name, x in stored.items()} == {
        "denseA": "bfloat16", "denseB": "float32", "upA": "bfloat16", "upB": "bfloat16"
    }  # fmt: skip
    uniform, _ = peft.load(tmp_path / "1", b.names, b.params)
    for path, f in factors(adapters).items():
        other: Any = uniform[path]
        np.testing.assert_array_equal(np.float32(f.scale) * np.float32(f.b), np.float32(other.b), path)

    def unequal(c: dict, t: dict) -> None:
        c["alpha_pattern"] = {"0.dense": 4}
        t.update({key: x.astype(ml_dtypes.bfloat16) for key, x in t.items()})

    folder = edited(tmp_path / "2", "toy", unequal)
    dense: Any = peft.load(folder, b.names, b.params)[0]["blocks/dense/kernel"]
    theirs = load_file(folder / ADAPTER_WEIGHTS)
    for i, alpha in enumerate((4, 7)):
        expected = theirs[f"{PRE}blocks.{i}.dense.lora_B.weight"].astype(np.float32).T * (alpha / 3)
        np.testing.assert_allclose(np.float32(dense.b[i]) * dense.scale, expected, rtol=1e-6)


def test_alpha_gives_the_scale_back_exactly() -> None:
    """For any rank and alpha, and integers stay integers."""
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
    peft.save(tmp_path, b.names, b.params, adapters, config)
    again, found = peft.load(tmp_path, b.names, b.params)
    assert_same(again, {path: adapters[path] for path in again})
    assert found.dtype == "bfloat16"
    assert load_file(tmp_path / ADAPTER_WEIGHTS).popitem()[1].dtype == ml_dtypes.bfloat16


def test_shapes_are_enough(tmp_path: Path) -> None:
    """`load` needs no values of the params, except to fill in a stacked leaf."""
    for case in ("plain", "dora", "llama"):
        b = base(CASES[case].base)
        assert_same(peft.load(FOLDER / case, b.names, jax.eval_shape(lambda b=b: b.params))[0], loaded(case)[0])
    for case, path in (("llama-layers", "model/layers/mlp/down_proj/kernel"), ("toy-whole", "blocks/norm/bias")):
        b = base(CASES[case].base)
        text = message(
            ValueError, lambda b=b, case=case: peft.load(FOLDER / case, b.names, jax.eval_shape(lambda: b.params))
        )
        expect(text, f"{path}': only some of its layers", "pass params with values")


# ---- the bare network and one with a head


def test_an_adapter_of_the_bare_network_fits_one_with_a_head_and_back(tmp_path: Path) -> None:
    """The first part of the names may be missing or superfluous."""
    bare, params = models.load(FOLDER / "base-roberta", task="features", key=jax.random.key(0))
    less, _ = peft.load(FOLDER / "patterns", models.tensor_names(bare), params)
    whole, config = loaded("patterns")
    assert {path.replace("params/", "params/encoder/"): f.scale for path, f in factors(less).items()} == {
        path: f.scale for path, f in factors(whole).items()
    }
    peft.save(tmp_path, models.tensor_names(bare), params, less, config)
    b = base("roberta")
    assert_same(peft.load(tmp_path, b.names, b.params)[0], whole)


def test_stored_embeddings_beside_factors_say_nothing_new(tmp_path: Path) -> None:
    """Embeddings that peft stores although the vocabulary did not change are read, a tied head included."""

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


@pytest.mark.parametrize("name", ["default", "policy"])
def test_keys_with_the_adapters_name(name: str, tmp_path: Path) -> None:
    """As in a model's own `state_dict`; peft reads them under the same name, and so does jlora."""

    def named(config: dict, tensors: dict) -> None:
        for key in [key for key in tensors if "lora_" in key]:
            module, part = re.fullmatch(r"(.+\.lora_\w+?)(\.weight)?", key).groups()  # pyright: ignore
            new = f"{module}.{name}{'.weight' if module.endswith('vector') else part or ''}"
            tensors[new] = tensors.pop(key)

    folder = edited(tmp_path / "it", "dora", named)
    b = base("roberta")
    assert_same(peft.load(folder, b.names, b.params)[0], loaded("dora")[0])
    if importlib.util.find_spec("peft"):
        import copy

        import peft as theirs

        with quiet():
            model = theirs.PeftModel.from_pretrained(copy.deepcopy(torch_state("roberta")), str(folder), name).eval()
            assert_close(torch_logits(model, "roberta"), EXPECTED["dora"])

    def second(config: dict, tensors: dict) -> None:
        tensors[A.replace(".weight", ".other.weight")] = tensors[A]

    text = message(peft.PeftError, lambda: peft.load(edited(tmp_path / "2", "plain", second), b.names, b.params))
    expect(text, f"'{A}' and '{A[:-7]}.other.weight' are one tensor")

"""What PEFT computes and jlora does not: all advice in the refusals is tried in the real peft."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.metadata
import json
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jlora
from jlora import models, peft
from jlora.files.hub_files import ADAPTER_CONFIG
from jlora.peft import options
from jlora.peft.config_file import _FIELDS
from tests.messages import expect, message
from tests.peft_cases import assert_close, needs_peft

pytestmark = needs_peft
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = np.random.default_rng(0).integers(3, 32, (2, 6))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Warnings of torch, transformers and peft are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def checkpoint() -> Path:
    """A tiny Llama with weights that do something."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=16, initializer_range=0.3, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def fresh(**options: Any) -> Any:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(checkpoint(), **options).eval()


def resized() -> Any:
    """Eight more tokens. transformers draws their rows, here always the same."""
    import torch

    torch.manual_seed(0)
    network = fresh()
    network.resize_token_embeddings(40)
    return network


def trained(network: Any, **fields: Any) -> Any:
    """PEFT's model, as if trained."""
    import peft as theirs

    return moved(theirs.get_peft_model(network, theirs.LoraConfig(**{"r": 4, "target_modules": TARGETS, **fields})))


def moved(model: Any) -> Any:
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn_like(value) * 0.2 if value.requires_grad else 0
    return model


def logits(network: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return network.eval()(torch.tensor(IDS)).logits.numpy()


def reloaded(folder: Path, **base: Any) -> Any:
    import peft as theirs

    return theirs.PeftModel.from_pretrained(fresh(**base), str(folder))


def refusal(folder: Path) -> str:
    model, params = models.load(checkpoint())
    return message(peft.PeftError, lambda: peft.load(folder, models.tensor_names(model), params))


def assert_merges(model: Any, folder: Path, expected: np.ndarray) -> None:
    """`merge_and_unload` gives a checkpoint that computes the same here."""
    model.merge_and_unload().save_pretrained(str(folder))
    merged, params = models.load(folder)
    assert_close(merged.apply(params, IDS), expected)


def assert_loads(folder: Path, expected: np.ndarray, base: Path | None = None) -> None:
    """An adapter computes the same here."""
    model, params = models.load(base or checkpoint())
    assert np.abs(expected - np.asarray(model.apply(params, IDS))).max() > 0.01
    adapters, _ = peft.load(folder, models.tensor_names(model), params)
    assert_close(model.apply(jlora.merge(params, adapters), IDS), expected)


BLOCKS = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2, "match_strict": False}
MERGED: dict[str, Any] = {
    "kasa_config": {},
    "monteclora_config": {},
    "target_parameters": ["q_proj.weight"],
    "trainable_token_indices": [3, 5],
    "use_bdlora": BLOCKS,
    "velora_config": {},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MERGED)
def test_what_is_merged_in_pytorch(name: str, tmp_path: Path) -> None:
    """Loaded again and merged, it computes what was trained."""
    option = name.strip()
    fields = {"target_modules": []} if option == "target_parameters" else {}
    model = trained(fresh(), **{option: MERGED[name]}, **fields)
    model.save_pretrained(str(tmp_path / "adapter"))
    expect(refusal(tmp_path / "adapter"), f"{option} = ", options.MERGE, "merge_and_unload().save_pretrained(")
    assert_merges(reloaded(tmp_path / "adapter"), tmp_path / "merged", logits(model))


def test_a_bias_of_lora_needs_one_in_the_base(tmp_path: Path) -> None:
    model = trained(fresh(), lora_bias=True)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        model.merge_and_unload()
    expect(
        refusal(tmp_path / "adapter"), "lora_bias = True", "from_pretrained(path, attention_bias=True, mlp_bias=True)"
    )
    model = reloaded(tmp_path / "adapter", attention_bias=True, mlp_bias=True)
    assert_merges(model, tmp_path / "merged", expected)


def test_repeated_layers_get_weights_of_their_own(tmp_path: Path) -> None:
    """Otherwise PEFT adds the updates of all copies to the weight that they share."""
    import torch

    model = trained(fresh(), layer_replication=[[0, 2], [0, 2]])
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    expect(
        refusal(tmp_path / "adapter"),
        "`for m in list(model.modules()):`",
        "`for name, p in list(m.named_parameters(recurse=False)): setattr(m, name, torch.nn.Parameter(p.data.clone()))",
    )
    wrong = logits(reloaded(tmp_path / "adapter").merge_and_unload())
    assert np.abs(wrong - expected).max() > 0.1
    model = reloaded(tmp_path / "adapter")
    for m in list(model.modules()):
        for name, p in list(m.named_parameters(recurse=False)):
            setattr(m, name, torch.nn.Parameter(p.data.clone()))
    assert_merges(model, tmp_path / "merged", expected)
    assert models.load(tmp_path / "merged")[0].config.num_hidden_layers == 4  # pyright: ignore


def _corda(config: Any, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    # peft.tuners.lora.corda imports attr.dataclass, and does not require the package.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for row in IDS:
            base(torch.tensor(row[None]))

    preprocess_corda(base, config, run_model=run)


def _lora_ga(config: Any, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from peft.tuners.lora.loraga import preprocess_loraga

    ids = torch.tensor(IDS)
    preprocess_loraga(base, config, lambda: base(ids, labels=ids).loss.backward())


def _loftq(config: Any, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def quantize(weight: Any, num_bits: int, reduced_rank: int, num_iter: int = 1) -> Any:
        step = weight.abs().max() / 7
        quantized = (weight / step).round() * step
        u, s, v = torch.linalg.svd(weight - quantized)
        root = s[:reduced_rank].sqrt()
        return quantized, (root[:, None] * v[:reduced_rank]).contiguous(), (u[:, :reduced_rank] * root).contiguous()

    # The real one needs a GPU and bitsandbytes; this one rounds the base weights to a grid of 15 values.
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", quantize)


INITS: dict[str, tuple[dict[str, Any], Callable[..., None] | None]] = {
    "pissa_niter_4": ({}, None),
    "corda": ({}, _corda),
    "lora_ga": ({}, _lora_ga),
    "loftq": ({"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}, _loftq),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("start", INITS)
def test_starts_that_change_the_base(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged or converted in the process that trained it; LoftQ cannot be converted, and none can be loaded again."""
    import peft as theirs

    fields: dict[str, Any]
    fields, prepare = INITS[start]
    fields = {"init_lora_weights": start, **fields}
    if start == "lora_ga":
        fields |= {"lora_ga_config": theirs.LoraGAConfig()}
    elif start == "corda":
        from peft.tuners.lora.config import CordaConfig

        fields |= {"corda_config": CordaConfig(corda_method="kpm")}
    network = fresh()
    config = theirs.LoraConfig(r=4, target_modules=TARGETS, **fields)
    if prepare:
        prepare(config, network, monkeypatch)
    model = theirs.get_peft_model(network, config)
    model.save_pretrained(str(tmp_path / "start"))
    expected = logits(moved(model))
    model.save_pretrained(str(tmp_path / "adapter"))
    text = refusal(tmp_path / "adapter")
    expect(text, f"init_lora_weights = '{start}'", "which changed the base weights", "in the process that trained it")

    def convert() -> Path:
        folder = tmp_path / "converted"
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        return folder

    unloaded: Any = copy.deepcopy(model)
    if start == "loftq":
        expect(text, "PEFT cannot convert it")
        assert np.abs(logits(reloaded(convert())) - expected).max() > 0.1
    else:
        expect(text, "peft.load(folder, names, params, start=start_folder)")
        assert_loads(convert(), expected)
        network, params = models.load(checkpoint())
        names = models.tensor_names(network)
        adapters, _ = peft.load(tmp_path / "adapter", names, params, start=tmp_path / "start")
        assert_close(network.apply(jlora.merge(params, adapters), IDS), expected)
        if start != "corda":  # which cannot be loaded at all
            assert np.abs(logits(reloaded(tmp_path / "adapter")) - expected).max() > 0.01
    assert_merges(model, tmp_path / "merged", expected)
    # The changed base, for which the adapter is plain LoRA.
    expect(text, "`model.unload().save_pretrained(new_base)`", "set init_lora_weights to true")
    unloaded.unload().save_pretrained(str(tmp_path / "base"))
    file = tmp_path / "adapter" / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": True}))
    assert_loads(tmp_path / "adapter", expected, tmp_path / "base")
    network, _ = models.load(checkpoint())
    with pytest.raises(peft.PeftError, match="names no initialization"):
        peft.load(tmp_path / "adapter", models.tensor_names(network), start=tmp_path / "start")


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 3}}, {"use_dora": True}])
@pytest.mark.parametrize("start", options.REPEATED_INITS)
def test_starts_that_peft_repeats_are_converted(start: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """From the original weights, to plain LoRA of twice the rank; shapes are not enough, and the advice works."""
    model = trained(fresh(), init_lora_weights=start, **fields)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert_close(logits(reloaded(tmp_path / "adapter")), expected)
    assert_loads(tmp_path / "adapter", expected)
    network, params = models.load(checkpoint())
    names = models.tensor_names(network)
    text = message(peft.PeftError, lambda: peft.load(tmp_path / "adapter", names, jax.eval_shape(lambda: params)))
    expect(text, f"init_lora_weights = '{start}'", "values of the base weights as params", options.MERGE)
    assert_merges(reloaded(tmp_path / "adapter"), tmp_path / "merged", expected)
    adapters, config = peft.load(tmp_path / "adapter", names, params)
    peft.save(tmp_path / "plain", names, params, adapters, config)
    assert_close(logits(reloaded(tmp_path / "plain")), expected)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica", "eva", False])
def test_starts_that_leave_the_base_alone_are_read(start: Any, tmp_path: Path) -> None:
    model = trained(fresh(), init_lora_weights=start)
    model.save_pretrained(str(tmp_path))
    assert_loads(tmp_path, logits(model))


EMPTY: dict[str, Any] = {
    "alora_invocation_tokens": [], "layer_replication": [], "megatron_config": {}, "target_parameters": [],
    "trainable_token_indices": {}, "use_qalora": False,
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_empty_settings_that_mean_nothing_are_read(name: str, tmp_path: Path) -> None:
    model = trained(fresh(), **{name: EMPTY[name]})
    model.save_pretrained(str(tmp_path))
    assert_loads(tmp_path, logits(model))


def test_what_depends_on_the_input_has_no_merged_form(tmp_path: Path) -> None:
    """PEFT refuses to merge it too; the adapters that Arrow chooses among are read."""
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.tuners.lora.config import ArrowConfig

    model = trained(fresh(), alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    model.save_pretrained(str(tmp_path / "alora"))
    expect(refusal(tmp_path / "alora"), "alora_invocation_tokens = [5]", "cannot be merged; use it in PyTorch")
    with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
        model.merge_and_unload()

    expert = trained(fresh(), target_modules=["q_proj"])
    expected = logits(expert)
    expert.save_pretrained(str(tmp_path / "expert"))
    model = create_arrow_model(fresh(), [str(tmp_path / "expert")], ArrowConfig(top_k=1))
    model.save_pretrained(str(tmp_path / "arrow"))
    expect(refusal(tmp_path / "arrow" / "arrow_router"), "arrow_config = ", "load each adapter by itself")
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow"):
        model.merge_and_unload()
    assert_loads(tmp_path / "arrow" / "task_0", expected)


def test_qalora_does_nothing_over_plain_weights(tmp_path: Path) -> None:
    import json

    model = trained(fresh(), use_qalora=True, qalora_group_size=2)
    model.save_pretrained(str(tmp_path))
    expect(refusal(tmp_path), "use_qalora = True", "set it to false")
    content = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**content, "use_qalora": False}))
    assert_loads(tmp_path, logits(model))


RESIZED: dict[str, dict[str, Any]] = {
    "neither": {},
    "lookup": {"target_modules": ["q_proj", "embed_tokens"]},
    "projection": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary(case: str, tmp_path: Path) -> None:
    """The refusal names the tables and their sizes; the base that PEFT writes back is one that the adapter fits."""
    network = resized()
    model = trained(network, **RESIZED[case])
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    text = refusal(tmp_path / "adapter")
    expect(text, "vocabulary was resized", "has 40 rows, 'params/", "has 32", "`base.resize_token_embeddings(40)`")
    expect(text, "`PeftModel.from_pretrained(base, folder).unload().save_pretrained(new_folder)`")
    assert ("lm_head" in text) == (case != "lookup") and "rank" not in text

    _unload(resized(), tmp_path)
    assert_loads(tmp_path / "adapter", expected, tmp_path / "base")
    network, _ = models.load(checkpoint())
    with pytest.raises(peft.PeftError, match="names no initialization"):
        peft.load(tmp_path / "adapter", models.tensor_names(network), start=tmp_path / "start")


def _unload(network: Any, folder: Path) -> None:
    import peft as theirs

    theirs.PeftModel.from_pretrained(network, str(folder / "adapter")).unload().save_pretrained(str(folder / "base"))


def test_a_table_stored_beside_its_factors(tmp_path: Path) -> None:
    """It is compared with the base's, which needs values; if it differs, the refusal says how to write that base."""
    import torch

    network = fresh()
    with torch.no_grad():
        network.get_input_embeddings().weight[3] += 1
    model = trained(network, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(str(tmp_path / "adapter"))
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    text = refusal(tmp_path / "adapter")
    expect(text, f"{name!r} differs from 'params/model/embed_tokens/embedding' in values", ".unload().save_pretrained(")
    names = models.tensor_names(models.load(checkpoint())[0])
    without = message(peft.PeftError, lambda: peft.load(tmp_path / "adapter", names))
    expect(without, f"{name!r} is stored next to factors: pass params with values")
    _unload(fresh(), tmp_path)
    assert_loads(tmp_path / "adapter", logits(model), tmp_path / "base")


def test_methods_beside_lora(tmp_path: Path) -> None:
    """Methods that PEFT can merge are loaded merged; prompt methods cannot be merged."""
    import peft as theirs

    model = moved(theirs.get_peft_model(fresh(), theirs.LoHaConfig(r=2, target_modules=TARGETS)))
    model.save_pretrained(str(tmp_path / "loha"))
    expect(refusal(tmp_path / "loha"), "peft_type = 'LOHA'; expected 'LORA'", options.MERGE)
    assert_merges(reloaded(tmp_path / "loha"), tmp_path / "merged", logits(model))
    model = theirs.get_peft_model(fresh(), theirs.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "prompt"))
    expect(refusal(tmp_path / "prompt"), "peft_type = 'PROMPT_TUNING'", "use it in PyTorch")
    assert not hasattr(model, "merge_and_unload")


def test_every_option_of_peft_is_known() -> None:
    """Each is read, has no effect, or is refused with advice that a test here tries."""
    import peft as theirs

    if not importlib.metadata.version("peft").startswith("0.21."):
        pytest.skip("the list is that of peft 0.21")
    tried = {name.strip() for name in MERGED} | set(EMPTY) | set(options._ADVICE)
    fields = {field.name for field in dataclasses.fields(theirs.LoraConfig)}
    assert not fields - set(_FIELDS) - options._INERT - tried

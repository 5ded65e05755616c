"""Random configurations of PEFT and of jlora on tiny networks of every family, and the logits of both sides."""

from __future__ import annotations

import copy
import functools
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import jlora
from jlora import models
from jlora.files.hub_files import ADAPTER_WEIGHTS

_SMALL: dict[str, Any] = {"vocab_size": 32, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2}
_COMMON: dict[str, Any] = {
    **_SMALL,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
_LLAMA: dict[str, Any] = {**_COMMON, "num_key_value_heads": 1, "pad_token_id": 1}
_GPT2: dict[str, Any] = {**_SMALL, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 1}
_VIT: dict[str, Any] = {
    **_COMMON,
    "image_size": 8,
    "patch_size": 4,
    "vocab_size": None,
    "max_position_embeddings": None,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama-tied": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-classifier": ("LlamaForSequenceClassification", {**_LLAMA, "attention_bias": True}),
    "gpt2": ("GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False}),
    "gpt2-tied": ("GPT2LMHeadModel", _GPT2),
    "bert": ("BertForSequenceClassification", {**_COMMON, "pad_token_id": 1}),
    "bert-features": ("BertModel", {**_COMMON, "pad_token_id": 1}),
    "roberta": ("RobertaForSequenceClassification", {**_COMMON, "pad_token_id": 1}),
    "vit": ("ViTForImageClassification", {k: v for k, v in _VIT.items() if v is not None}),
}
"""The class of transformers and its configuration; two layers each."""

TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}


class Side(NamedTuple):
    """A network of ours, for one table of names.

    Attributes:
      apply: compiled, from parameters to logits.
      params: float32, rounded to bfloat16 where the draw is in bfloat16.
      names, uses: of them.
    """

    apply: Any
    params: Any
    names: Any
    uses: Any

    def logits(self, adapters: Any = None) -> np.ndarray:
        """The logits with adapters merged, or without adapters."""
        return np.asarray(self.apply(self.params if adapters is None else jlora.merge(self.params, adapters)))


class Base(NamedTuple):
    """One network on both sides.

    Attributes:
      network: PyTorch's.
      ours: the same.
      untied: the same, loaded with a separate output projection if PyTorch's is tied.
      task: PEFT's task type, or None.
      inputs: PyTorch's arguments.
    """

    network: Any
    ours: Side
    untied: Side | None
    task: str | None
    inputs: dict[str, Any]


@functools.cache
def base(name: str, dtype: str) -> Base:
    """A network whose weights are all random, biases and norms too."""
    import torch
    import transformers

    kind, config = BASES[name]
    torch.manual_seed(0)
    family = re.sub(r"(For\w+|LMHead)?(Model)?$", "", kind)
    network = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**config)).eval()
    with torch.no_grad():
        for value in network.parameters():
            value += torch.randn_like(value) * 0.2 if value.ndim == 1 else 0
            value.copy_(value.to(getattr(torch, dtype)).to(torch.float32))
    ours, inputs = _inputs(name)
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        sides = [_side(name, Path(folder), ours, untie) for untie in ([False, True] if "tied" in name else [False])]
    task = next((task for ending, task in TASKS.items() if kind.endswith(ending)), None)
    return Base(network, sides[0], sides[1] if len(sides) > 1 else None, task, inputs)


def _inputs(name: str) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """A batch, for ours and for PyTorch's; rows of classifiers are padded."""
    import torch

    rng = np.random.default_rng(0)
    if name == "vit":
        images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
        return (images,), {"pixel_values": torch.tensor(images.transpose(0, 3, 1, 2))}
    ids = rng.integers(3, 32, (3, 6)).astype(np.int32)
    mask = np.ones_like(ids)
    if "SequenceClassification" in BASES[name][0]:
        ids[1, 4:], mask[1, 4:] = 1, 0
    return (ids, mask), {"input_ids": torch.tensor(ids, dtype=torch.long), "attention_mask": torch.tensor(mask)}


_APPLY: dict[tuple[str, bool], Any] = {}


def _side(name: str, folder: Path, inputs: tuple[np.ndarray, ...], untie: bool) -> Side:
    model, params = models.load(folder, untie=untie)
    if (name, untie) not in _APPLY:  # both dtypes compute in float32

        def apply(params: Any) -> Any:
            return first(model.apply(params, *inputs))

        _APPLY[name, untie] = jax.jit(apply), jlora.trace(apply, params)
    apply, uses = _APPLY[name, untie]
    return Side(apply, params, models.tensor_names(model), uses)


def first(output: Any) -> Any:
    """The logits, or the hidden states of a network without a head."""
    return output[0] if isinstance(output, tuple) else output


def logits(b: Base, network: Any) -> np.ndarray:
    """The logits of PyTorch."""
    import torch

    with torch.no_grad():
        return first(network.float().eval()(**b.inputs, return_dict=False)).numpy()


# ---- a configuration of PEFT


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def some(self, choices: Sequence[Any], most: int) -> list[Any]:
        count = min(len(choices), int(self.rng.integers(1, most + 1)))
        return [choices[int(i)] for i in sorted(self.rng.permutation(len(choices))[:count])]


def _end(module: str, parts: int) -> str:
    return ".".join(module.split(".")[-parts:])


def _pattern(draw: Draw, modules: Sequence[str]) -> str:
    """A regular expression that matches some of the modules."""
    ends = sorted({_end(module, 1) for module in modules})
    return draw.one(
        [
            rf".*\.({'|'.join(draw.some(ends, 3))})",
            re.sub(r"(\\\.\d\\\.).*\\\.", r"\1.*", re.escape(draw.one(modules))),
            "|".join(map(re.escape, draw.some(modules, 3))),
            rf"(.*\.)?{draw.one(ends)[:-1]}.",
        ]
    )


def _names(draw: Draw, modules: Sequence[str], most: int = 3) -> list[str]:
    """Ends of names, as in PEFT's lists of modules."""
    parts = draw.one([1, 1, 1, 2, 3, 9])
    found = draw.some(sorted({_end(module, parts) for module in modules}), most)
    return (
        [*found, found[0][1:]] if draw.chance(0.2) else found
    )  # some of PEFT's fields take the last one for a whole name


def draw_config(draw: Draw, b: Base) -> dict[str, Any]:
    """Arguments of ``peft.LoraConfig``."""
    kinds: dict[str, list[str]] = {}
    for name, module in b.network.named_modules():
        kinds.setdefault(type(module).__name__, []).append(name)
    linear = kinds.get("Linear", []) + kinds.get("Conv1D", [])
    tables, convs = kinds.get("Embedding", []), kinds.get("Conv2d", [])
    norms = [name for kind, found in kinds.items() if "Norm" in kind for name in found]
    blocks = [
        n
        for n, m in b.network.named_modules()
        if n and "." in n and list(m.children()) and "List" not in type(m).__name__
    ]
    adaptable = linear + (tables if draw.chance(0.25) else []) + (convs if draw.chance(0.5) else [])

    config: dict[str, Any] = {"r": draw.one([1, 2, 3, 4]), "lora_alpha": draw.one([1, 2, 3, 6, 7, 16, 0.5, 5.3])}
    way = draw.one(["names"] * 5 + ["pattern"] * 3 + ["all-linear", "default"])
    if way == "names":
        config["target_modules"] = _names(draw, adaptable)
    elif way == "pattern":
        config["target_modules"] = _pattern(draw, adaptable)
    elif way == "all-linear":
        config["target_modules"] = "all-linear"
    if draw.chance(0.35):
        config["modules_to_save"] = _names(draw, norms + linear + tables + blocks, 2)
    if draw.chance(0.25):
        config["exclude_modules"] = (_names if draw.chance(0.6) else _pattern)(draw, adaptable)
    for table, values in (("rank_pattern", [1, 2, 3, 5]), ("alpha_pattern", [1, 3, 8, 2.5])):
        if draw.chance(0.35):
            ends = [
                *_names(draw, adaptable, 2),
                draw.one([f"^{re.escape(m)}" for m in adaptable] + [r"0\..*", r".*\.1\..*"]),
            ]
            config[table] = {end: draw.one(values) for end in draw.some(ends, 3)}
    if way == "names" and draw.chance(0.3):
        config["layers_to_transform"] = draw.one([0, 1, [0], [1], [0, 1]])
        if draw.chance(0.5):
            pattern = {"vit": "layers", "llam": "layers", "gpt2": "h"}.get(b.network.config.model_type[:4], "layer")
            config["layers_pattern"] = draw.one([pattern, [pattern], ["blocks", pattern]])
    config["bias"] = draw.one(["none"] * 4 + ["all", "lora_only"])
    config["use_dora"], config["use_rslora"] = draw.chance(0.3), draw.chance(0.3)
    config["lora_dropout"] = draw.one([0.0, 0.1])
    if b.task and draw.chance(0.4):
        config["task_type"] = b.task
    if kinds.get("Conv1D"):
        config["fan_in_fan_out"] = True
    return config


def make_peft(config: dict[str, Any], draw: Draw, b: Base, dtype: str, folder: Path) -> Any:
    """PEFT's model with random values wherever it trains, saved in ``folder``."""
    import peft as theirs
    import torch

    torch.manual_seed(int(draw.rng.integers(2**31)))
    network = copy.deepcopy(b.network).to(getattr(torch, dtype))
    adapted = theirs.get_peft_model(network, theirs.LoraConfig(**config), autocast_adapter_dtype=False)
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value += torch.randn_like(value) * 0.2
    adapted.save_pretrained(str(folder), save_embedding_layers=draw.one(["auto"] * 6 + [True, False]))
    return adapted


def read_peft(b: Base, folder: Path, *, whole: bool = False) -> np.ndarray:
    """The logits of PEFT with an adapter; it must not miss a tensor or, with ``whole``, leave one unread."""
    import peft as theirs

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = theirs.PeftModel.from_pretrained(copy.deepcopy(b.network), str(folder))
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    assert not missing, missing
    if whole:
        known = set(theirs.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        unread = set(load_file(folder / ADAPTER_WEIGHTS)) - known
        assert not unread, f"peft does not read {unread}"
    return logits(b, adapted)


# ---- a configuration of ours


def draw_ours(draw: Draw, b: Base, dtype: str) -> tuple[jlora.LoraConfig, dict[str, Any], dict[str, Any]]:
    """A config, adapters with random values, and options of `peft.save`."""
    names = b.ours.names
    # A weight without a gradient, such as the pooler of bare BERT, is refused if it is a target.
    live = {path for path, use in b.ours.uses.items() if any(u.gradient for u in use.uses)}
    weights = [path for path, name in names.items() if name.kind != "array" and path in live]
    matrices = [path for path in weights if names[path].kind != "embedding"]
    targets = [*dict.fromkeys([*draw.some(weights, 4), draw.one(matrices)])]
    others = [path for path in names if path not in targets]
    config = jlora.LoraConfig(
        draw.one([1, 2, 3]),
        alpha=draw.one([1.0, 3.0, 5.3, 16.0]),
        targets=tuple(f"^{re.escape(p)}$" for p in targets),
        exclude=(),
        overrides=tuple(
            jlora.Override(draw.one(targets), rank=draw.one([1, 4]), alpha=draw.one([2.0, 7.0]))
            for _ in "a" * draw.chance(0.4)
        ),
        train_also=tuple(f"^{re.escape(p)}$" for p in draw.some(others, 3)) if draw.chance(0.4) else (),
        dropout=draw.one([0.0, 0.1]),
        use_dora=draw.chance(0.3),
        use_rslora=draw.chance(0.3),
        dtype=dtype,
    )
    adapters = jlora.init(jax.random.key(0), b.ours.params, config, b.ours.uses)
    leaves, treedef = jax.tree.flatten(adapters)
    noise = [jnp.asarray(draw.rng.normal(0, 0.2, x.shape), x.dtype) for x in leaves]
    simple = not config.use_dora and not config.train_also
    options: dict[str, Any] = {"uniform_rank": draw.chance(0.4 if simple else 0.1)}
    if b.task and draw.chance(0.4):
        options["task_type"] = b.task
    return config, treedef.unflatten([x + n for x, n in zip(leaves, noise, strict=True)]), options

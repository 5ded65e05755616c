"""A family of networks: its configuration, its Flax modules and its table of tensor names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_type_hints

import flax.linen as nn

from jlora._src.tree.sharding import ShardingRules
from jlora.fields import Within, faults, fits
from jlora.files.errors import ModelError
from jlora.files.hub_files import CONFIG
from jlora.files.tensor_names import TensorNames
from jlora.messages import bullets, nearest, shown

TaskName = Literal["features", "sequence-classification", "causal-lm", "image-classification"]
"""The output of a network: its hidden states, or the outputs of the head for a task."""

ENDINGS: dict[str, TaskName] = {
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "Model": "features",
}
"""The endings of transformers' class names, as in ``architectures`` of a config.json."""

NOT_COMPUTED = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path _num_labels architectures attn_implementation
    auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label keys_to_ignore_at_inference label2id length_penalty max_length
    max_new_tokens min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_scores prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sentence_transformers sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)
"""Attributes of a config.json that never change what a network computes."""

FIXED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "use_return_dict": (True,),
}
"""Attributes that would change any network's computation, with the values for which they do not."""


# Types of attributes. Sizes index an axis; layers are bounded, so that a damaged file cannot cause an endless loop.
Size = Annotated[int, Within(1, 2**31 - 1)]
Layers = Annotated[int, Within(1, 1000)]
Token = Annotated[int, Within(-(2**31), 2**31 - 1)]
Rate = Annotated[float, Within(0, 1)]
Epsilon = Annotated[float, Within(0, 1)]
NonNegative = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
SizeOrNull: TypeAlias = Size | None
PositiveOrNull: TypeAlias = Positive | None

SHARED: Mapping[str, Any] = {
    "architectures": list[str] | None,
    "id2label": dict[str, str] | None,
    "num_labels": SizeOrNull,
}
"""Attributes that determine task and labels in every family."""

INTERNAL = {"internal": True}
"""Metadata of a field that the family computes and no config.json has."""

DERIVED = {"derived": True}
"""Metadata of a field that the family computes if a config.json lacks it or has null."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The configuration of a network. A family's fields are named as in its ``config.json``.

    Type hints define the allowed values. Fields with the metadata `INTERNAL` are in no config.json.

    Attributes:
      hf: the content of the config.json, as JSON text; `to_hf` returns it with later changes.
      num_labels: the number of outputs of a classifier.
      generation: the content of the generation_config.json next to it, as JSON text; only `generate` uses it.
    """

    hf: str = dataclasses.field(default="{}", kw_only=True, repr=False)
    num_labels: int = dataclasses.field(default=2, kw_only=True)
    generation: str = dataclasses.field(default="", kw_only=True, repr=False, compare=False, metadata=INTERNAL)

    @property
    def attributes(self) -> dict[str, Any]:
        """The content of the original config.json."""
        return json.loads(self.hf)

    def to_hf(self) -> dict[str, Any]:
        """The content of a ``config.json`` for this network."""
        current, original = dataclasses.asdict(self), self.attributes
        return {**original, **{name: current[name] for name in original if name in current}}


Config = TypeVar("Config", bound=ModelConfig)


def read_config(
    kind: type[Config],
    hf: Mapping[str, Any],
    *,
    others: Mapping[str, Any] | None = None,
    ignored: frozenset[str] = frozenset(),
    fixed: Mapping[str, tuple[Any, ...]] | None = None,
    divides: Iterable[tuple[str, str]] = (),
    derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: {},
) -> Config:
    """A family's configuration from the content of a ``config.json``.

    Args:
      kind: the family's class; fields missing in ``hf`` keep their defaults.
      others: types of non-field attributes, inputs of ``derive``.
      ignored: more attributes that do not change what the network computes.
      fixed: more attributes that would, with the accepted values.
      divides: pairs of attributes; the first must divide the second.
      derive: computes fields from ``hf``, once all attributes have the declared types.

    Raises:
      ModelError: listing every attribute that is unknown, missing, of another type or out of range, or has a value
        that the network does not support.
    """
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in ("hf", "num_labels")}
    hints = {**_hints(kind, fields), **(others or {}), **SHARED}
    fixed = {**FIXED, **(fixed or {})}
    unusable = _unusable(hf, fields, hints, fixed, {*hints, *fixed, *ignored, *NOT_COMPUTED})
    odd = faults({name: value for name, value in hf.items() if name not in fixed}, hints)
    odd += _not_dividing({name: hf.get(name, field.default) for name, field in fields.items()}, divides)
    if unusable or odd:
        raise ModelError(
            f"{kind.__name__}: {len(unusable) + len(odd)} attribute(s) of {CONFIG} cannot be used, or may change what "
            f"the network computes:{bullets(unusable + odd)}\nExpected only known attributes"
            + (f". If one has no effect, remove it from the {CONFIG}." if unusable else ", with these values.")
        )
    stated = {name: hf[name] for name in fields if name in hf and name in hints} | dict(derive(hf))
    labels = hf.get("num_labels") or len(hf.get("id2label") or (0, 1))
    return kind(**stated, num_labels=labels, hf=json.dumps(dict(hf), sort_keys=True))


def _hints(kind: type[Any], fields: Mapping[str, dataclasses.Field[Any]]) -> dict[str, Any]:
    """The types of the fields that a config.json may have."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: hints[name] | None if field.metadata.get("derived") else hints[name]
        for name, field in fields.items()
        if not field.metadata.get("internal")
    }


def _unusable(
    hf: Mapping[str, Any],
    fields: Mapping[str, dataclasses.Field[Any]],
    hints: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    known: Collection[str],
) -> list[str]:
    """One line per attribute that is unknown, missing, or has an unsupported value."""
    wrong = [f"{name} = {shown(hf[name])} is unknown{nearest(name, hints)}" for name in hf if name not in known]
    wrong += [
        f"{name} = {shown(hf[name])}; this network supports {' or '.join(map(repr, values))}"
        for name, values in fixed.items()
        if name in hf and not any(type(hf[name]) is type(one) and hf[name] == one for one in values)
    ]
    return wrong + [
        f"{name} is missing"
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and not field.metadata and name not in hf
    ]


def _not_dividing(sizes: Mapping[str, Any], divides: Iterable[tuple[str, str]]) -> list[str]:
    """One line per pair whose first size does not divide the second."""
    return [
        f"{part} = {sizes[part]}; expected a divisor of {whole} = {sizes[whole]}"
        for part, whole in divides
        if all(fits(sizes[name], Size) for name in (part, whole)) and sizes[whole] % sizes[part]
    ]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
      config: ``config(hf) -> ModelConfig``, from the content of a config.json.
      networks: the Flax module for each task; called with ``(config, dtype=..., param_dtype=..., remat=...,
        attention=...)``.
      tensor_names: ``tensor_names(config, task)``: the tensor names of each leaf, in transformers 5 and in checkpoints.
      sharding_rules: split the leaves over a mesh with the axes fsdp and tensor, for all networks of the
        family; a network may lack leaves for some rules.
      prefix: of tensor names in a network with a head, such as ``bert.``; the bare network has none.
      architecture: the stem of transformers' class names, such as ``Bert``.
      heads: a regular expression for the paths of heads; a checkpoint may lack these.
      unread: a regular expression for checkpoint tensors that these networks ignore: other heads, buffers.
    """

    config: Callable[[Mapping[str, Any]], ModelConfig]
    networks: Mapping[TaskName, Callable[..., nn.Module]]
    tensor_names: Callable[[Any, TaskName], TensorNames]
    sharding_rules: ShardingRules
    prefix: str
    architecture: str
    heads: str
    unread: str


def check_length(network: str, length: int, most: int | None) -> None:
    """Raises a ModelError if a row of ``length`` tokens is longer than ``most``, the network's number of positions."""
    if most is not None and length > most:
        raise ModelError(
            f"{length} tokens, but {network} has {most} positions; expected at most {most}: truncate the input, or "
            "pass position_ids below that"
        )


def ending_of(task: TaskName) -> str:
    """The ending of transformers' class names for a task: the first one in `ENDINGS`."""
    return next(ending for ending, one in ENDINGS.items() if one == task)


def task_of(hf: Mapping[str, Any]) -> TaskName:
    """The task of a checkpoint, from its ``architectures``; an unknown class means the bare network."""
    for name in hf.get("architectures") or ():
        for ending, task in ENDINGS.items():
            if name.endswith(ending):
                return task
    return "features"


assert set(ENDINGS.values()) == set(get_args(TaskName))

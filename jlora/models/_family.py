"""What a family of networks brings: its configuration, its Flax modules and its name table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_type_hints

import flax.linen as nn

from jlora._src.tree.sharding import ShardingRules
from jlora.fields import Within, faults, fits
from jlora.files.tensor_names import TensorNames
from jlora.messages import bullets, nearest, shown

Task = Literal["features", "sequence-classification", "causal-lm", "image-classification"]
"""What the network ends in: its hidden states, or the head for a task."""

ENDINGS: dict[str, Task] = {
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "Model": "features",
}
"""How the names of transformers' classes end, as ``architectures`` in a config.json gives them."""

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
"""Attributes of a config.json that do not change what the network computes, in any family."""

FIXED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "use_return_dict": (True,),
}
"""Attributes that would change it, with the values for which they do not, in any family."""


# What attributes may be. Sizes index an axis; layers are bounded so that a damaged file makes no endless loop.
Size = Annotated[int, Within(1, 2**31 - 1)]
Layers = Annotated[int, Within(1, 1000)]
Token = Annotated[int, Within(-(2**31), 2**31 - 1)]
Rate = Annotated[float, Within(0, 1)]
Epsilon = Annotated[float, Within(0, 1)]
Spread = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
SizeOrNull: TypeAlias = Size | None
PositiveOrNull: TypeAlias = Positive | None

SHARED: Mapping[str, Any] = {
    "architectures": list[str] | None,
    "id2label": dict[str, str] | None,
    "num_labels": SizeOrNull,
}
"""Attributes that tell task and labels, in any family."""

INTERNAL = {"internal": True}
"""Metadata of a configuration's field that no config.json has: the family works it out."""

DERIVED = {"derived": True}
"""Metadata of one that a config.json may leave out, or have as null: then the family works it out."""


class ModelError(ValueError):
    """A checkpoint or its configuration that cannot be used; the message names what, and the way out."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What determines a network. A family's own fields carry the names that they have in its ``config.json``.

    Their type hints say what may stand there. Those with the metadata `INTERNAL` are in no config.json.

    Attributes:
      hf: the config.json that it was read from, as JSON text; `to_hf` returns it with the changes made since.
      generation: the generation_config.json beside it, as JSON text; it changes nothing that is computed here.
    """

    hf: str = dataclasses.field(default="{}", kw_only=True, repr=False)
    num_labels: int = dataclasses.field(default=2, kw_only=True)
    generation: str = dataclasses.field(default="", kw_only=True, repr=False, compare=False, metadata=INTERNAL)

    def to_hf(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        mine = dataclasses.asdict(self)
        original = json.loads(self.hf)
        return {**original, **{name: mine[name] for name in original if name in mine}}


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
      kind: the family's class; a field that ``hf`` lacks has its default.
      others: the types of attributes that are no fields, from which ``derive`` works some out.
      ignored: further attributes that do not change what the network computes.
      fixed: further attributes that would, with the values that are accepted.
      divides: pairs of attributes, of which the first divides the second.
      derive: fields that the family works out itself; it is called when all attributes are of their types.

    Raises:
      ModelError: naming every attribute that is unknown, missing, of another type or out of its range, or has a value
        that the network does not have.
    """
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in ("hf", "num_labels")}
    internal = {name for name, field in fields.items() if field.metadata.get("internal")}
    hints = get_type_hints(kind, include_extras=True)
    hints = {n: hints[n] | None if f.metadata.get("derived") else hints[n] for n, f in fields.items()}
    hints = {**{n: hint for n, hint in hints.items() if n not in internal}, **(others or {}), **SHARED}
    fixed = {**FIXED, **(fixed or {})}
    known = {*hints, *fixed, *ignored, *NOT_COMPUTED}
    wrong = [f"{name} = {shown(hf[name])} is unknown{nearest(name, hints)}" for name in hf if name not in known]
    wrong += [
        f"{name} = {shown(hf[name])}; this network computes with {' or '.join(map(repr, values))}"
        for name, values in fixed.items()
        if name in hf and not any(type(hf[name]) is type(one) and hf[name] == one for one in values)
    ]
    wrong += [
        f"{name} is missing"
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and not field.metadata and name not in hf
    ]
    odd = faults({name: value for name, value in hf.items() if name not in fixed}, hints)
    sizes = {name: hf.get(name, field.default) for name, field in fields.items()}
    odd += [
        f"{part} = {sizes[part]}; expected a divisor of {whole} = {sizes[whole]}"
        for part, whole in divides
        if all(fits(sizes[name], Size) for name in (part, whole)) and sizes[whole] % sizes[part]
    ]
    if wrong or odd:
        raise ModelError(
            f"{kind.__name__}: {len(wrong) + len(odd)} attribute(s) of config.json cannot be used, or may change what "
            f"the network computes:{bullets(wrong + odd)}\nExpected only attributes that it knows"
            + (". If one has no effect, take it out of the config.json." if wrong else ", with such values.")
        )
    stated = {name: hf[name] for name in fields if name in hf and name not in internal} | dict(derive(hf))
    labels = hf.get("num_labels") or len(hf.get("id2label") or (0, 1))
    return kind(**stated, num_labels=labels, hf=json.dumps(dict(hf), sort_keys=True))


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
      config: ``config(hf) -> ModelConfig``, from the content of a config.json.
      networks: the Flax module for each task; called with ``(config, dtype=..., param_dtype=..., remat=...)``.
      names: ``names(config, task)``: where each leaf of that network lies in transformers 5 and in its checkpoints.
      rules: how the leaves of all its networks are split over a mesh with the axes fsdp and tensor; one network need
        not have a leaf for each.
      prefix: what the names of the bare network have in front of them in a network with a head, such as ``bert.``.
      architecture: the stem of transformers' class names, such as ``Bert``.
      heads: a regular expression of paths that a checkpoint may lack, because they belong to a new head.
      unread: a regular expression of tensors in checkpoints that these networks do not have: other heads, buffers.
    """

    config: Callable[[Mapping[str, Any]], ModelConfig]
    networks: Mapping[Task, Callable[..., nn.Module]]
    names: Callable[[Any, Task], TensorNames]
    rules: ShardingRules
    prefix: str
    architecture: str
    heads: str
    unread: str


def check_length(network: str, length: int, most: int | None) -> None:
    """Raises a ModelError if a row of ``length`` tokens is longer than the positions that a network has."""
    if most is not None and length > most:
        raise ModelError(
            f"{length} tokens, but {network} has {most} positions; expected at most {most}: truncate the input, or "
            "give position_ids below that"
        )


def ending_of(task: Task) -> str:
    """How the names of transformers' classes for a task end; the inverse of `ENDINGS`, where the first one counts."""
    return next(ending for ending, one in ENDINGS.items() if one == task)


def task_of(hf: Mapping[str, Any]) -> Task:
    """The task of a checkpoint, from its ``architectures``; a class that is not known is taken for the bare network."""
    for name in hf.get("architectures") or ():
        for ending, task in ENDINGS.items():
            if name.endswith(ending):
                return task
    return "features"


assert set(ENDINGS.values()) == set(get_args(Task))

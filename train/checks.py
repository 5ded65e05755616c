"""Whether a configuration is sound: everything that can be checked before anything is built, all of it at once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jlora import LoraConfig
from jlora.fields import bad_pattern, expected, fits
from jlora.messages import shown
from train.config import (
    CausalLM,
    ComputeConfig,
    ConfigError,
    DataConfig,
    Domain,
    FitConfig,
    ImageClassification,
    LearningRates,
    Mlp,
    PatchTransformer,
    Pretrained,
    ProcessesConfig,
    SaveConfig,
    SequenceClassification,
    TrainConfig,
    Writer,
)


def validate(config: TrainConfig) -> None:
    """Check every field that can be checked without building anything.

    Raises:
      ConfigError: with a line for each problem: the field, what was got, what was expected, and what to pass instead.
    """
    parts = get_type_hints(TrainConfig)
    whole = all(fits(getattr(config, name), hint) for name, hint in parts.items())  # else there is nothing to compare
    refuse([*_walk(config, ""), *(_across(config) if whole else ())])


def validate_parts(config: TrainConfig) -> None:
    """Check that the parts of a config file's configuration are of their kinds, before flags are put over them: tyro
    takes the defaults for what is of another kind. Raises as `validate` does."""
    hints = get_type_hints(TrainConfig)
    found = [_wrong_part(name, getattr(config, name), hint) for name, hint in hints.items()]
    refuse([problem for problem in found if problem])


def validate_for(config: TrainConfig, examples: int) -> None:
    """Check what depends on the number of training examples; raises as `validate` does."""
    phases = (("base", config.base), ("fit", config.fit))
    refuse(
        [
            f"{phase}.batch_size: got {fit.batch_size}, expected at most the {examples} training examples; "
            f"pass {flag(phase + '.batch_size')} {examples}"
            for phase, fit in phases
            if fit is not None and fit.batch_size > examples
        ]
    )


def refuse(problems: list[str]) -> None:
    """Raises a ConfigError that lists ``problems``, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{count} in the configuration:", *problems]))


def flag(path: str) -> str:
    """The command-line flag of a field."""
    return "--" + path.replace("_", "-")


@dataclass(frozen=True)
class _Expectation:
    """What a field may hold: a test, the same in words, and a value that passes it."""

    holds: Callable[[Any], bool]
    words: str
    example: str

    def or_none(self) -> _Expectation:
        return _Expectation(lambda x: x is None or self.holds(x), f"{self.words}, or None", self.example)


def _whole(least: int, example: int) -> _Expectation:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return _Expectation(holds, f"a whole number >= {least}", str(example))


def _number(words: str, test: Callable[[float], bool], example: str) -> _Expectation:
    def holds(value: Any) -> bool:
        return fits(value, float) and test(value)

    return _Expectation(holds, words, example)


def _tuple_of(one: _Expectation, words: str, example: str, *, least: int = 1) -> _Expectation:
    def holds(value: Any) -> bool:
        return isinstance(value, tuple | list) and len(value) >= least and all(map(one.holds, value))

    return _Expectation(holds, words, example)


def _are_weights(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(_RATE.holds(weight) for weight in value.values())
    return value == "balanced"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _is_dir(value: Any) -> bool:
    try:
        return value is None or isinstance(value, Path) and (not value.exists() or value.is_dir())
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r".+:\d+", value) is not None


def _are_rules(value: Any) -> bool:
    spec = re.compile(r"(-|\w+(\+\w+)*)(, *(-|\w+(\+\w+)*))*")
    return isinstance(value, dict) and all(
        isinstance(v, str) and spec.fullmatch(v) and bad_pattern(k) is None for k, v in value.items()
    )


_RATE = _number("a number > 0", lambda x: x > 0, "0.002")
_TEXT = _Expectation(lambda x: isinstance(x, str) and bool(x), "a name", "text")
_NAMES = _tuple_of(_TEXT, "", "", least=2)
_LABELS = _Expectation(
    lambda x: _NAMES.holds(x) and len({*x}) == len(x), "two or more names, each once", "negative positive"
).or_none()
_WEIGHTS = _Expectation(
    _are_weights, "balanced, or a number > 0 by each label's name", "negative 1 positive 3"
).or_none()
_SOURCE = _Expectation(lambda x: isinstance(x, str) and bool(x), "a file, a folder or a dataset's name", "train.jsonl")

_EXPECTATIONS: Mapping[type, Mapping[str, _Expectation]] = {
    TrainConfig: {
        "name": _Expectation(_is_name, "letters, digits and underscores", "digits"),
        "seed": _whole(0, 0),
        "eval_every": _whole(1, 1),
        "eval_every_steps": _whole(1, 100).or_none(),
        "eval_batch_size": _whole(1, 64),
        "resume": _Expectation(
            lambda x: x in ("auto", "never") or _whole(0, 0).holds(x),
            "auto, never, or the step of a checkpoint",
            "auto",
        ).or_none(),
        "keep": _Expectation(lambda x: x in ("last", "best"), "last or best", "best").or_none(),
        "log_every": _whole(1, 10).or_none(),
        "log": _Expectation(
            lambda x: isinstance(x, tuple | list) and all(one in get_args(Writer) for one in x),
            "tensorboard, wandb",
            "tensorboard",
        ),
        "run_dir": _Expectation(_is_dir, "a directory, or a path where there is none yet", "runs/mine"),
        "cache_dir": _Expectation(lambda x: isinstance(x, Path), "a pathlib.Path", "~/.cache/jlora"),
    },
    FitConfig: {
        "epochs": _whole(1, 20),
        "batch_size": _whole(1, 64),
        "warmup": _number("a share of the steps, 0 <= warmup < 1", lambda x: 0 <= x < 1, "0.1"),
        "weight_decay": _number("a number >= 0", lambda x: x >= 0, "0.0001"),
        "clip": _RATE.or_none(),
        "lora_plus": _RATE,
        "label_smoothing": _number("a share, 0 <= label_smoothing < 1", lambda x: 0 <= x < 1, "0.1"),
        "patience": _whole(1, 3).or_none(),
    },
    ComputeConfig: {
        "data": _whole(1, 8).or_none(),
        "fsdp": _whole(1, 8),
        "tensor": _whole(1, 8),
        "rules": _Expectation(
            _are_rules, "patterns of paths, and for each axes of the mesh such as fsdp,-", "lm_head fsdp,-"
        ),
        "accumulate": _whole(1, 4),
    },
    ProcessesConfig: {
        "coordinator": _Expectation(_is_address, "HOST:PORT", "10.0.0.1:1234").or_none(),
        "count": _whole(1, 2).or_none(),
        "index": _whole(0, 0).or_none(),
    },
    SaveConfig: {
        "every_minutes": _RATE,
        "every_steps": _whole(1, 100).or_none(),
        "max_to_keep": _whole(1, 3),
    },
    LearningRates: dict.fromkeys(("base", "lora", "full", "head"), _RATE),
    DataConfig: {
        "train": _SOURCE,
        "validation": _SOURCE.or_none(),
        "limit": _whole(1, 1000).or_none(),
        "validation_limit": _whole(1, 1000).or_none(),
        "holdout": _number("a share, 0 <= holdout < 1", lambda x: 0 <= x < 1, "0.1"),
        "buckets": _tuple_of(_whole(1, 64), "lengths", "32 64 128").or_none(),
    },
    Domain: {"quarter_turns": _whole(0, 1)},
    SequenceClassification: {
        "text": _TEXT,
        "pair": _TEXT.or_none(),
        "label": _TEXT,
        "labels": _LABELS,
        "class_weights": _WEIGHTS,
        "max_length": _whole(4, 128),
    },
    CausalLM: {"max_length": _whole(4, 512)},
    ImageClassification: {
        "image": _TEXT,
        "label": _TEXT,
        "labels": _LABELS,
        "class_weights": _WEIGHTS,
        "side": _whole(1, 28).or_none(),
        "brightest": _RATE,
        "domains": _Expectation(lambda x: fits(x, dict[str, Domain]), "a dict of Domains by their names", "{}"),
    },
    Pretrained: {"path": _Expectation(lambda x: isinstance(x, str) and bool(x), "a folder or a model's id", "gpt2")},
    PatchTransformer: {
        "patch": _whole(1, 2),
        "width": _whole(1, 96),
        "depth": _whole(1, 2),
        "heads": _whole(1, 4),
        "hidden": _whole(1, 192),
    },
    Mlp: {"hidden": _tuple_of(_whole(1, 128), "widths", "128")},
}


def _walk(part: Any, prefix: str) -> Iterator[str]:
    """The problems of a dataclass and of those in it, each field against its type and its expectation."""
    hints = get_type_hints(type(part))
    expectations = _EXPECTATIONS.get(type(part), {})
    for field in dataclasses.fields(part):
        path, value, hint = prefix + field.name, getattr(part, field.name), hints[field.name]
        if expectation := expectations.get(field.name):
            if not expectation.holds(value):
                got = str(value) if isinstance(value, Path) else shown(value)
                yield f"{path}: got {got}, expected {expectation.words}; pass {flag(path)} {expectation.example}"
        elif get_origin(hint) is Literal and value not in get_args(hint):
            options = get_args(hint)
            words = ", ".join(map(str, options))
            yield f"{path}: got {value!r}, expected one of {words}; pass {flag(path)} {options[0]}"
        elif problem := _wrong_part(path, value, hint):
            yield problem
        elif not _kinds(hint) and get_origin(hint) is not dict and not fits(value, hint):
            yield f"{path}: got {shown(value)}, expected {expected(hint)}; pass {flag(path)}"
        if isinstance(value, dict):
            for name, one in value.items():
                yield from _walk(one, f"{path}.{name}.") if dataclasses.is_dataclass(one) else ()
        if dataclasses.is_dataclass(value) and not isinstance(value, LoraConfig):
            yield from _walk(value, f"{path}.")


def _wrong_part(path: str, value: Any, hint: Any) -> str | None:
    """The problem of a field that has to hold a dataclass, if it does not."""
    if not (kinds := _kinds(hint)) or isinstance(value, _options(hint)):
        return None
    names = [kind.__name__ for kind in kinds]
    return f"{path}: got {value!r}, expected a {' or '.join(names)}; write {path} = {names[0]}(...)"


def _kinds(hint: Any) -> list[type]:
    return [kind for kind in _options(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _across(config: TrainConfig) -> Iterator[str]:
    """Problems between fields, of parts that are what they should be."""
    yield from _across_computing(config.compute, config.processes)
    yield from _across_fit(config)
    if config.data.validation is not None and config.data.holdout:
        yield (
            f"data.holdout: got {config.data.holdout} beside data.validation = {config.data.validation!r}, expected "
            "one of them; pass --data.validation None, or --data.holdout 0"
        )
    task, model = config.task, config.model
    if isinstance(model, PatchTransformer) and isinstance(model.width, int) and isinstance(model.heads, int):
        if model.heads > 0 and model.width % model.heads:
            nearest = max(1, round(model.width / model.heads)) * model.heads
            yield (
                f"model.width: got {model.width}, expected a multiple of model.heads = {model.heads}; "
                f"pass {flag('model.width')} {nearest}"
            )
    if isinstance(model, PatchTransformer | Mlp):
        if isinstance(task, SequenceClassification | CausalLM):
            yield (
                f"model: got {type(model).__name__}, which sees images; {type(task).__name__} needs a "
                "Pretrained(path=...) network"
            )
        elif config.base is None:
            yield (
                f"base: got None, expected a FitConfig: a {type(model).__name__} has no checkpoint, so it is "
                "trained from scratch first; write base = FitConfig(...)"
            )
    elif isinstance(model, Pretrained) and config.base is not None:
        yield "base: got a FitConfig, expected None: a Pretrained network is not trained from scratch"
    if isinstance(task, CausalLM):
        pair = task.prompt is not None and task.completion is not None
        ways = [task.messages is not None, pair, task.text is not None]
        if sum(ways) != 1 or (task.prompt is None) != (task.completion is None):
            yield (
                f"task: got messages={task.messages!r}, prompt={task.prompt!r}, completion={task.completion!r}, "
                f"text={task.text!r}; expected the columns of one way: messages, or prompt and completion, or text"
            )
        yield from _across_chat(task)
        if config.mode == "head":
            yield "mode: got 'head', expected 'lora' or 'full': a language model gets no new head; pass --mode lora"
    if isinstance(task, SequenceClassification) and task.regression and task.labels is not None:
        yield "task.labels: got names, expected None: a regression has a number for its label"
    if isinstance(task, SequenceClassification) and task.regression and task.class_weights is not None:
        yield "task.class_weights: got weights, expected None: a regression has no classes"


def _across_chat(task: CausalLM) -> Iterator[str]:
    if task.chat and task.text is not None:
        yield (
            "task.chat: got True with task.text, expected False: a plain text is learnt as it is; pass --task.no-chat, "
            "or messages, or prompt and completion"
        )
    if task.messages is None and not task.chat:
        for name in ("system", "template", "tools"):
            if (value := getattr(task, name)) is not None:
                yield (
                    f"task.{name}: got {value!r:.80} without a chat, expected None; pass --task.chat with prompt and "
                    f"completion, or --task.{name} None"
                )


def _across_computing(compute: ComputeConfig, processes: ProcessesConfig) -> Iterator[str]:
    axes = {axis: getattr(compute, axis) for axis in ("data", "fsdp", "tensor")}
    if compute.layout != "mesh" and (used := [axis for axis, size in axes.items() if size not in (None, 1)]):
        sizes = " and ".join(f"{axis}={axes[axis]}" for axis in used)
        yield (
            f"compute.layout: got {compute.layout!r} with {sizes}; only a mesh has these axes; "
            "pass --compute.layout mesh"
        )
    if compute.layout != "mesh" and compute.rules:
        yield f"compute.rules: got rules with {compute.layout!r}, expected none: only a mesh divides weights"
    given: dict[str, Any] = {name: getattr(processes, name) for name in ("coordinator", "count", "index")}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            yield f"processes: got no {' and no '.join(missing)}; expected coordinator, count and index, or none"
    elif fits(index := given["index"], int) and fits(count := given["count"], int) and index >= count:
        yield f"processes.index: got {index}, expected less than processes.count = {count}"


def _across_fit(config: TrainConfig) -> Iterator[str]:
    for name, fit in (("base", config.base), ("fit", config.fit)):
        if not isinstance(fit, FitConfig):
            continue
        if fit.lora_plus != 1 and (name == "base" or config.mode != "lora"):
            what = "a base" if name == "base" else f"mode {config.mode!r}"
            yield f"{name}.lora_plus: got {fit.lora_plus}, expected 1: {what} has no factors A and B"
        if fit.label_smoothing and getattr(config.task, "regression", False):
            yield f"{name}.label_smoothing: got {fit.label_smoothing}, expected 0: a regression has no classes"
        if name == "base" and fit.patience is not None:
            yield f"base.patience: got {fit.patience}, expected None: a base is trained to its end"

"""The whole configuration: data, training, devices, checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from jlora import HEADS, LoraConfig, Scheme
from jlora.fields import bad_pattern
from jlora.files.buckets import default_cache, is_in_bucket
from train.config.fields import (
    Constraint,
    Count,
    Fraction,
    NotNegative,
    Part,
    Positive,
    Seed,
    Source,
    at_least,
    flag,
    misplaced_parts,
    problems,
    refuse,
)
from train.config.networks import Mlp, NetworkConfig, PatchTransformer
from train.config.sweep import LORA_ONLY, SweepConfig
from train.config.tasks import CausalLM, SequenceClassification, TaskConfig

Mode = Literal["lora", "full", "head"]
Schedule = Literal["cosine", "linear", "constant"]
LayoutName = Literal["jit", "pmap", "mesh"]
Remat = Literal["none", "dots", "full"]
Writer = Literal["tensorboard", "wandb"]
Limit = Annotated[int, at_least(1, 1000)]
Lengths = Annotated[tuple[Count, ...], Constraint("one or more lengths >= 1", bool, "32 64 128")]

NEW_HEAD = LoraConfig(targets=(), train_also=HEADS)
EVERYTHING = LoraConfig(targets=(), train_also=(r".",))
"""The weights that the modes head and full train."""


@dataclass(frozen=True)
class DataConfig(Part):
    """Training and validation examples.

    A source is a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder of such files, or a dataset on the hub as
    owner/name or owner/name/config. Files and folders may be in a bucket, as gs://bucket/train.jsonl. A split may
    follow after a colon: a split of the dataset or folder, or the rows of a file whose column "split" contains it.
    Example: nyu-mll/glue/sst2:train.

    Values are read unchanged: cells of .csv and .tsv are strings, values of .json and .jsonl keep their JSON types, and
    each line of a .txt is a row with the column "text". Text files are UTF-8, and may be compressed as .gz, .bz2 or
    .xz.
    """

    #: Source of the training examples.
    train: Source
    #: Source of the validation examples. Default: the split of the same dataset, or the file next to the training file,
    #: named validation, dev, valid, val or test.
    validation: Source | None = None
    #: Maximum number of training examples, a fixed random choice.
    limit: Limit | None = None
    #: Maximum number of validation examples, the first ones.
    validation_limit: Limit | None = None
    #: Fraction of the training examples to hold out for validation, if there are no validation examples.
    holdout: Fraction = 0.0
    #: Treat quotes in .tsv files as in .csv files, not as characters of the cell.
    quoted_tsv: bool = False
    #: Lengths to which batches of texts are padded. Default: quarters of the task's max_length.
    buckets: Lengths | None = None

    def conflicts(self) -> Iterator[str]:
        if self.validation is not None and self.holdout:
            yield (
                f"holdout: got {self.holdout} beside data.validation = {self.validation!r}, expected one of them; pass "
                "--data.validation None, or --data.holdout 0"
            )


@dataclass(frozen=True)
class FitConfig(Part):
    """The optimizer and its schedule."""

    #: Passes over the training examples.
    epochs: Count = 20
    #: Examples per step, over all devices. The last, incomplete batch of an epoch is dropped.
    batch_size: Count = 64
    #: Decay of the learning rate after the warm-up.
    schedule: Schedule = "cosine"
    #: Fraction of all steps over which the learning rate rises linearly to its peak: step 1 of w has peak / w.
    warmup: Fraction = 0.1
    #: adamw; or, for adapters, AdamW on preconditioned gradients: lora-fa (Zhang et al. 2023) trains B alone, and does
    #: not keep the inputs of adapted weights for the backward pass; riemannian (Zhang and Pilanci 2024) divides the
    #: gradient of each factor by the Gram matrix of the other.
    optimizer: Literal["adamw", "lora-fa", "riemannian"] = "adamw"
    #: Decoupled weight decay.
    weight_decay: NotNegative = 1e-4
    #: What weight decay shrinks: all trained parameters, or matrices only, without DoRA's magnitudes, norms and biases.
    decay: Literal["all", "matrices"] = "all"
    #: Maximum global norm of the gradient, or None.
    clip: Positive | None = 1.0
    #: Learning rate of B as a multiple of A's (LoRA+, Hayou et al. 2024, who use 16).
    lora_plus: Positive = 1.0
    #: Probability spread over all classes, or over the vocabulary.
    label_smoothing: Fraction = 0.0
    #: Stop after this many evaluations in a row without a new best. Keeps the best adapters, unless --keep last.
    patience: Annotated[int, at_least(1, 3)] | None = None


def _is_scheme(name: str) -> bool:
    try:
        return bool(Scheme.parse(name))
    except ValueError:
        return False


SchemeName = Annotated[
    str, Constraint("one of nf4, int4, int8, fp8, mxfp4, also with a block as in int4-64", _is_scheme, "nf4")
]


@dataclass(frozen=True)
class FrozenBase(Part):
    """The base of a network with a checkpoint."""

    #: Quantize the frozen weights of linear layers, except output heads, while they are read: to nf4 (QLoRA), int8,
    #: int4, fp8 or mxfp4; a number is the size of blocks with a scale of their own, as in int4-64. Default: as stored.
    quantize: SchemeName | None = None


@dataclass(frozen=True)
class LearningRates(Part):
    """Peak learning rates. --learning-rate VALUE sets the mode's."""

    #: For training a base from scratch.
    base: Positive = 2e-3
    #: For adapters (--mode lora).
    lora: Positive = 1e-3
    #: For full fine-tuning (--mode full).
    full: Positive = 5e-5
    #: For a new head on the frozen base (--mode head).
    head: Positive = 1e-2


def _are_rules(rules: dict[str, str]) -> bool:
    axes = re.compile(r"(-|\w+(\+\w+)*)(, *(-|\w+(\+\w+)*))*")
    return all(axes.fullmatch(spec) and bad_pattern(pattern) is None for pattern, spec in rules.items())


ShardingRules = Annotated[
    dict[str, str],
    Constraint("patterns of paths, and for each axes of the mesh such as fsdp,-", _are_rules, "lm_head fsdp,-"),
]


@dataclass(frozen=True)
class ComputeConfig(Part):
    """Devices and memory. The results of training do not depend on these, up to rounding, and to the dropout
    masks under pmap and accumulate.
    """

    #: jit: one device. pmap: batches split over all devices, each with a copy of the base. mesh: a mesh of data x
    #: fsdp x tensor; batches are split over the first two axes, weights over the last two.
    layout: LayoutName = "jit"
    #: Size of the mesh axis data. Default: all devices left by fsdp and tensor.
    data: Annotated[int, at_least(1, 8)] | None = None
    #: Size of the mesh axis fsdp: every weight is split into this many parts, and gathered for use.
    fsdp: Count = 1
    #: Size of the mesh axis tensor: every matrix product is split over this many devices.
    tensor: Count = 1
    #: Sharding rules that take precedence over the network's own: a pattern of paths, and for each axis of the weight a
    #: mesh axis or -, such as lm_head/kernel fsdp,tensor.
    rules: ShardingRules = field(default_factory=dict)
    #: Gradient accumulation: parts of a batch, computed one after the other.
    accumulate: Count = 1
    #: Rematerialization in the backward pass: nothing (none), everything but matrix products (dots), or whole layers
    #: (full).
    remat: Remat = "none"
    #: Keep compiled programs in --cache-dir, so that a resumed run and later ones start sooner. A folder in
    #: JAX_COMPILATION_CACHE_DIR takes precedence.
    compilation_cache: bool = True

    def conflicts(self) -> Iterator[str]:
        if self.layout == "mesh":
            return
        axes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor")}
        if sizes := " and ".join(f"{axis}={size}" for axis, size in axes.items() if size not in (None, 1)):
            yield f"layout: got {self.layout!r} with {sizes}; only a mesh has these axes; pass --compute.layout mesh"
        if self.rules:
            yield f"rules: got rules with {self.layout!r}, expected none: only a mesh shards weights"


def _is_address(text: str) -> bool:
    return re.fullmatch(r".+:\d+", text) is not None


@dataclass(frozen=True)
class ProcessesConfig(Part):
    """Processes of a distributed run. Each runs the same command on the same data, shared or copied."""

    #: Address of the first process, HOST:PORT.
    coordinator: Annotated[str, Constraint("HOST:PORT", _is_address, "10.0.0.1:1234")] | None = None
    #: Number of processes.
    count: Annotated[int, at_least(1, 2)] | None = None
    #: Index of this process, from 0.
    index: Annotated[int, at_least(0)] | None = None
    #: Read all this from the environment: TPU pods, Slurm, Open MPI, Kubernetes. The default if the environment
    #: variables of Slurm or a TPU name several processes.
    auto: bool = False

    def conflicts(self) -> Iterator[str]:
        given: dict[str, Any] = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            absent = " and no ".join(missing)
            yield f"{missing[0]}: got no {absent}; expected coordinator, count and index, or none"
        elif self.index is not None and self.count is not None and self.index >= self.count:
            yield f"index: got {self.index}, expected less than processes.count = {self.count}"


@dataclass(frozen=True)
class SaveConfig(Part):
    """Checkpoints, to resume an interrupted run from."""

    #: Minutes between checkpoints.
    every_minutes: Positive = 5.0
    #: Steps between checkpoints, instead of minutes.
    every_steps: Annotated[int, at_least(1, 100)] | None = None
    #: Number of newest checkpoints to keep, besides the best one with --keep best.
    max_to_keep: Count = 3


def _may_be_dir(path: Path) -> bool:
    if is_in_bucket(path):
        return len(path.parts) > 2
    try:
        return not path.exists() or path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


Directory = Annotated[Path, Constraint("a directory, a new path, or gs://bucket/name", _may_be_dir, "runs/mine")]
LocalPath = Annotated[Path, Constraint("a local path", lambda path: not is_in_bucket(path), "~/.cache/jlora")]
Resume = Annotated[
    Literal["auto", "never"] | int,
    Constraint("auto, never, or the step of a checkpoint", lambda x: isinstance(x, str) or x >= 0, "auto"),
]


@dataclass(frozen=True)
class TrainConfig(Part):
    """A run: adapts a network to a task."""

    #: Name of the configuration; run directories are named after it.
    name: Annotated[str, Constraint("letters, digits and underscores", str.isidentifier, "digits")]
    task: TaskConfig
    model: NetworkConfig
    data: DataConfig
    #: What to adapt, and how; as jlora.LoraConfig.
    lora: LoraConfig
    #: What to train: adapters (lora), all weights (full), or a new head alone (head).
    mode: Mode = "lora"
    #: Seed of initialization, data order and dropout.
    seed: Seed = 0
    #: The frozen base: of a checkpoint (FrozenBase), or how to train it from scratch (FitConfig).
    base: FitConfig | FrozenBase = FrozenBase()
    #: Training of the adapters, or of the weights that --mode selects.
    fit: FitConfig = FitConfig()
    learning_rate: LearningRates = LearningRates()
    sweep: SweepConfig = SweepConfig()
    #: Epochs between evaluations on the validation examples.
    eval_every: Count = 1
    #: Steps between evaluations, instead of epochs. The last step is always evaluated.
    eval_every_steps: Annotated[int, at_least(1, 100)] | None = None
    #: Batch size of evaluations.
    eval_batch_size: Count = 64
    #: Adapters to keep: the last ones, or the best ones by the task's main metric. Default: the last ones; with
    #: --fit.patience, the best ones.
    keep: Literal["last", "best"] | None = None
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    processes: ProcessesConfig = ProcessesConfig()
    save: SaveConfig = SaveConfig()
    #: Default: resume the run in --run-dir, or the newest unfinished run of this configuration under runs/ that has a
    #: checkpoint. auto: also a run under runs/ with another number of epochs; a finished run trains further if
    #: the number grew. never: always start in a new directory. A number: resume from the checkpoint of this
    #: step, and delete later ones (0 starts over).
    resume: Resume | None = None
    #: Steps between lines of metrics, printed and in metrics.jsonl. Default: about fifty lines per run.
    log_every: Annotated[int, at_least(1, 10)] | None = None
    #: Log metrics to these too, besides metrics.jsonl.
    log: tuple[Writer, ...] = ()
    #: Run directory, also in a bucket as gs://bucket/run. Default: a new one under runs/.
    run_dir: Directory | None = None
    #: Local directory of trained bases, converted and tokenized data, compiled programs and copies from buckets.
    cache_dir: LocalPath = field(default_factory=default_cache)

    def conflicts(self) -> Iterator[str]:
        task, model = self.task, self.model
        if isinstance(model, PatchTransformer | Mlp):
            if isinstance(task, SequenceClassification | CausalLM):
                yield (
                    f"model: got {type(model).__name__}, which takes images; {type(task).__name__} needs a "
                    "Pretrained(path=...) network"
                )
            elif self.scratch is None:
                yield (
                    f"base: got a FrozenBase, expected a FitConfig: a {type(model).__name__} has no checkpoint and is "
                    "trained from scratch first; write base = FitConfig(...)"
                )
        elif self.scratch is not None:
            yield "base: got a FitConfig, expected a FrozenBase: a Pretrained network is not trained from scratch"
        if self.quantize is not None and self.mode == "full":
            yield (
                f"base.quantize: got {self.quantize!r} with mode 'full', expected None: full fine-tuning changes the "
                "weights, and an update is lost in few bits; pass --mode lora"
            )
        if isinstance(task, CausalLM) and self.mode == "head":
            yield "mode: got 'head', expected 'lora' or 'full': a language model needs no new head; pass --mode lora"
        for phase, fit in self.phases.items():
            if fit.lora_plus != 1 and (phase == "base" or self.mode != "lora"):
                what = "a base" if phase == "base" else f"mode {self.mode!r}"
                yield f"{phase}.lora_plus: got {fit.lora_plus}, expected 1: {what} has no factors A and B"
            if fit.optimizer != "adamw" and (phase == "base" or self.mode != "lora"):
                what = "a base" if phase == "base" else f"mode {self.mode!r}"
                yield f"{phase}.optimizer: got {fit.optimizer!r}, expected 'adamw': {what} has no factors A and B"
            if fit.label_smoothing and getattr(task, "regression", False):
                yield f"{phase}.label_smoothing: got {fit.label_smoothing}, expected 0: a regression has no classes"
            if phase == "base" and fit.patience is not None:
                yield f"base.patience: got {fit.patience}, expected None: a base is trained for all its epochs"
        if self.sweep:
            yield from self._sweep_conflicts()

    def _sweep_conflicts(self) -> Iterator[str]:
        for name in LORA_ONLY if self.mode != "lora" else ():
            if values := self.sweep.given.get(name):
                yield f"sweep.{name}: got {values} with mode {self.mode!r}, which has no adapters; pass --mode lora"
        if isinstance(self.resume, int):
            yield f"resume: got step {self.resume} with a sweep, expected auto or never; pass --resume auto"
        if "wandb" in self.log:
            yield "log: got wandb with a sweep, but wandb has one run in a process; pass --log tensorboard"
        if self.compute.layout == "pmap":
            yield "compute.layout: got 'pmap' with a sweep, expected jit or mesh; pass --compute.layout mesh"
        if self.processes.count is not None and self.processes.count > 1:
            yield (
                f"processes.count: got {self.processes.count} with a sweep, expected one process: omit the flags of "
                f"processes, or {self.sweep.flags}"
            )

    def check(self) -> None:
        """Check everything that needs neither devices nor data.

        Raises:
          ConfigError: with a line for each problem: the field, its value, the expected one, and what to pass instead.
        """
        refuse(problems(self))

    def check_parts(self) -> None:
        """Check the kinds of the parts before flags override fields of them; raises as `check`.

        tyro would replace a part of another kind with defaults.
        """
        refuse(misplaced_parts(self))

    def check_examples(self, count: int) -> None:
        """Check the fields that depend on the number of training examples; raises as `check`."""
        refuse(
            f"{phase}.batch_size: got {fit.batch_size}, expected at most the {count} training examples; "
            f"pass {flag(phase + '.batch_size')} {count}"
            for phase, fit in self.phases.items()
            if fit.batch_size > count
        )

    @property
    def adapted(self) -> LoraConfig:
        """The LoRA config of the mode."""
        return {"lora": self.lora, "full": EVERYTHING, "head": NEW_HEAD}[self.mode]

    @property
    def keeps_best(self) -> bool:
        """Whether the best adapters are kept, and not the last ones."""
        return self.keep == "best" or (self.keep is None and self.fit.patience is not None)

    @property
    def scratch(self) -> FitConfig | None:
        """How the base is trained from scratch; None for a checkpoint."""
        return self.base if isinstance(self.base, FitConfig) else None

    @property
    def quantize(self) -> str | None:
        """The scheme of the frozen weights."""
        return self.base.quantize if isinstance(self.base, FrozenBase) else None

    @property
    def phases(self) -> dict[str, FitConfig]:
        """The trainings of a run, by the name of their field."""
        return {"fit": self.fit} if self.scratch is None else {"base": self.scratch, "fit": self.fit}

"""What a run can be told: the schema of the files in ``configs/``.

A configuration is data: frozen dataclasses without behaviour. What is sound is said in `train.checks`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jlora import LoraConfig

Mode = Literal["lora", "full", "head"]
Schedule = Literal["cosine", "linear", "constant"]
Dtype = Literal["float32", "bfloat16", "float16"]
LayoutName = Literal["jit", "pmap", "mesh"]
Remat = Literal["none", "dots", "full"]
Writer = Literal["tensorboard", "wandb"]

ASSETS = Path(__file__).resolve().parent / "assets"


class ConfigError(ValueError):
    """The user's configuration cannot be run; the message lists why and the way out."""


def default_cache_dir() -> Path:
    """``~/.cache/jlora``, or its place under ``XDG_CACHE_HOME``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jlora"


# Tasks


@dataclass(frozen=True)
class SequenceClassification:
    """Give a text, or a pair of texts, one of several labels; or a number.

    Attributes:
      text: the column of the text.
      pair: the column of the second text of a pair, or None.
      label: the column of the label: a name, a class number, or with ``regression`` a number.
      labels: the names of the classes; by default those that the data or its training labels give.
      class_weights: how much an example of each label counts in the loss: numbers by the labels' names, or balanced for
        scikit-learn's, examples / (labels * examples of the label). The loss is a weighted mean, as PyTorch's; figures
        on the validation examples, their loss too, are not weighted.
      regression: whether the label is a number to be predicted (mean squared error).
      max_length: tokens of a text, at most; longer ones are cut, and told.
      truncation: the side on which they are cut.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    regression: bool = False
    max_length: int = 128
    truncation: Literal["right", "left"] = "right"


@dataclass(frozen=True)
class CausalLM:
    """Continue a text: supervised fine-tuning of a language model.

    An example is one of: ``messages``, of which the assistant's are learnt, each with the token that ends it; a
    ``prompt`` and its ``completion``, which is learnt and follows it without a space between; or plain ``text``, learnt
    whole. What is learnt is decided by characters: a token that holds any character of an answer is learnt. Prompts and
    texts have one begin and one end token, if the tokenizer has them; a chat template writes its own.

    Messages are ``{"role", "content"}``, with all that the template reads beside: ``tool_calls``, ``name``,
    ``reasoning_content``. A content is a text, or ``[{"type": "text", "text"}]``: several are joined by a newline for
    templates that take texts alone. Keys without a value are dropped. Where a template marks what is learnt by
    ``{% generation %}``, that is learnt; elsewhere the text that follows its generation prompt, up to the end token.
    A template that shows earlier turns otherwise than they are generated (without their thinking) makes several
    examples of a conversation, so that each turn is learnt where it is generated. What a template would leave out is
    refused.

    Attributes:
      messages, prompt, completion, text: columns; give messages, or prompt and completion, or text.
      tools: a column of tools for the chat template: lists of JSON schemas, or their JSON.
      system: the system message of conversations that have none, or None for none.
      chat: whether prompt and completion are put into the tokenizer's chat template; messages always are.
      template: a chat template (Jinja), or a file with one, to use instead of the tokenizer's; or None.
      learn_prompt: learn the prompts and the others' messages too: a conversation whole, as the template shows it.
      pack: put several examples into one sequence of ``max_length`` tokens; none sees another.
      max_length: tokens of a sequence, at most; what is longer is cut on the right, and told.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: str | None = None
    system: str | None = None
    chat: bool = False
    template: str | None = None
    learn_prompt: bool = False
    pack: bool = False
    max_length: int = 512


@dataclass(frozen=True)
class Domain:
    """How the images of a domain are shown to the network.

    Attributes:
      quarter_turns: counter-clockwise turns by 90 degrees, which lose no pixel.
      invert: exchange ink and paper.
    """

    quarter_turns: int = 0
    invert: bool = False


@dataclass(frozen=True)
class ImageClassification:
    """Give an image one of several labels.

    Attributes:
      image: the column of the image: a picture (a file's path, its content, or an image of `datasets`), or its pixels
        as numbers, in a flat list or row by row.
      label: the column of the label: a name or a class number.
      labels: the names of the classes; by default those that the data or its training labels give.
      class_weights: how much an example of each label counts in the loss; see `SequenceClassification`.
      side: of the square images in pixels; by default that of the checkpoint, or of the first image. Pictures of
        another size are resized, and those that are not square are squeezed into it.
      brightest: white, where the pixels are numbers, or a picture's format does not say (32 bits, floats).
      domains: names of domains in which the test images are shown, and how. The last is the one that is learnt; the
        first, the one on which a network without a checkpoint is trained from scratch.
    """

    image: str = "image"
    label: str = "label"
    labels: tuple[str, ...] | None = None
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    side: int | None = None
    brightest: float = 255.0
    domains: dict[str, Domain] = field(default_factory=dict)


TaskConfig = SequenceClassification | CausalLM | ImageClassification


# Networks


@dataclass(frozen=True)
class Pretrained:
    """A network of `jlora.models` with the weights of a Hugging Face checkpoint.

    Attributes:
      path: a folder, or the id of a model on the hub.
      revision: of a model on the hub.
      dtype: in which it computes.
      param_dtype: of its frozen weights; by default as they are stored.
      dropout: apply the network's own dropout while training, beside the adapters'.
      untie: give a language model an output projection of its own where its config.json ties it to the embedding.
    """

    path: str
    revision: str | None = None
    dtype: Dtype = "float32"
    param_dtype: Dtype | None = None
    dropout: bool = False
    untie: bool = False


@dataclass(frozen=True)
class PatchTransformer:
    """A small transformer over the patches of an image, trained from scratch.

    Attributes:
      patch: side of the square patches, in pixels.
      width: of the residual stream.
      depth: number of transformer blocks.
      heads: attention heads in a block.
      hidden: width of the hidden layer of a block's MLP.
    """

    patch: int = 2
    width: int = 96
    depth: int = 2
    heads: int = 4
    hidden: int = 192


@dataclass(frozen=True)
class Mlp:
    """Linear layers with ReLU between them, on the pixels of an image, trained from scratch.

    Attributes:
      hidden: the widths of the hidden layers.
    """

    hidden: tuple[int, ...] = (128,)


NetworkConfig = Pretrained | PatchTransformer | Mlp


# Data and training


@dataclass(frozen=True)
class DataConfig:
    """Where the examples come from.

    A source is a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder of such files, or a dataset on the hub as
    ``owner/name`` or ``owner/name/config``. After a colon may stand a split: of the hub's or folder's dataset, or of a
    file the rows whose column ``split`` says so. Example: ``nyu-mll/glue/sst2:train``.

    What files say is what is read: cells of .csv and .tsv are strings, values of .json and .jsonl have their JSON
    types, and each line of .txt is a row with the column ``text``. Text files are UTF-8; they may be compressed (.gz,
    .bz2, .xz).

    Attributes:
      train: the source of the training examples.
      validation: the source of the others; by default the split, or the file beside ``train``, named validation, dev,
        valid, val or test.
      limit: use so many training examples at most, chosen at random but always the same.
      validation_limit: use so many of the others at most, the first ones.
      holdout: the share of the training examples that is set apart where there are no validation examples.
      quoted_tsv: cells of .tsv files may stand in quotes, as those of .csv files may; by default a quote there is a
        character like others.
      buckets: lengths to which batches of texts are padded; by default four quarters of the task's ``max_length``.
    """

    train: str
    validation: str | None = None
    limit: int | None = None
    validation_limit: int | None = None
    holdout: float = 0.0
    quoted_tsv: bool = False
    buckets: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FitConfig:
    """One training, of the base or of the adapters; AdamW.

    Attributes:
      epochs: passes over the training examples.
      batch_size: examples in a step, over all devices; an epoch's last, incomplete batch is dropped.
      schedule: how the learning rate falls after the warm-up.
      warmup: share of all steps over which the learning rate rises to its peak; the first of w has peak / w.
      weight_decay: decoupled, and applied to all that is trained.
      clip: largest global norm of the gradient, or None.
      lora_plus: how many times A's learning rate B has; 1 for none of LoRA+ (Hayou et al. 2024, who take 16).
      label_smoothing: share of a label's probability that is spread over all classes or tokens.
      patience: end after so many measurements in a row without a new best, or None. The best adapters are kept then,
        if `TrainConfig.keep` does not say otherwise.
    """

    epochs: int = 20
    batch_size: int = 64
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    weight_decay: float = 1e-4
    clip: float | None = 1.0
    lora_plus: float = 1.0
    label_smoothing: float = 0.0
    patience: int | None = None


@dataclass(frozen=True)
class LearningRates:
    """The peak learning rate of every training; low-rank factors take several times that of whole weights.

    On the command line ``--learning-rate VALUE`` sets the one of the run's mode.

    Attributes:
      base: of the base, from scratch.
      lora: of adapters.
      full: of full fine-tuning.
      head: of a new head on the frozen base.
    """

    base: float = 2e-3
    lora: float = 1e-3
    full: float = 5e-5
    head: float = 1e-2


# Where and how it is computed


@dataclass(frozen=True)
class ComputeConfig:
    """How a step is computed: on which devices, and in how much memory. What is learnt is the same for all of it,
    but for the masks of dropout under pmap and accumulate.

    Attributes:
      layout: jit: one device. pmap: the rows of a batch divided over all devices, each with a copy of the base.
        mesh: devices as a mesh of data x fsdp x tensor; rows are divided over the first two, weights over the last two.
      data: size of that axis of the mesh; by default what the others leave of the devices.
      fsdp: into how many parts every weight is divided; a part is fetched when it is used.
      tensor: over how many devices every product is divided.
      rules: where weights lie, before the network's own rules: patterns of paths, and for each axis of the weight the
        axis of the mesh or `-`, such as `lm_head/kernel` and `fsdp,tensor`.
      accumulate: parts into which a batch is divided, computed one after the other.
      remat: what the backward pass computes again instead of keeping it: nothing (none), all but the results of matrix
        products (dots), or whole layers (full).
    """

    layout: LayoutName = "jit"
    data: int | None = None
    fsdp: int = 1
    tensor: int = 1
    rules: dict[str, str] = field(default_factory=dict)
    accumulate: int = 1
    remat: Remat = "none"


@dataclass(frozen=True)
class ProcessesConfig:
    """The processes that train together. Each runs the same command on the same data, be it one file or a copy each.

    Attributes:
      coordinator: address and port of the first process, HOST:PORT.
      count: how many there are.
      index: which one this is, from 0.
      auto: find all that in the environment: on TPU pods, under Slurm, Open MPI and Kubernetes. Where Slurm or a TPU's
        environment variables tell of several processes, it is found without being asked for.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    auto: bool = False


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints of a training, from which it goes on when it was stopped.

    Attributes:
      every_minutes: time between two of them.
      every_steps: steps between two of them, instead.
      max_to_keep: how many of the newest are kept, beside the best one where that is kept.
    """

    every_minutes: float = 5.0
    every_steps: int | None = None
    max_to_keep: int = 3


@dataclass(frozen=True)
class TrainConfig:
    """Adapt a network to a task.

    Attributes:
      name: of the configuration; run directories are named after it.
      task: what is learnt, and from which columns.
      model: the network.
      data: the examples.
      lora: what is adapted, and how; see `jlora.LoraConfig`.
      mode: what is trained: adapters, every weight, or a new head alone.
      seed: of initialization, order of the data and dropout.
      base: the training from scratch of a network that has no checkpoint.
      fit: the training.
      learning_rate: peak learning rates.
      eval_every: epochs between two measurements on the validation examples.
      eval_every_steps: steps between two of them, instead; the last step is always measured.
      eval_batch_size: examples predicted at once.
      keep: the adapters that are kept: the last ones, or the best measured ones by the task's main figure; by default
        the last ones, and with ``fit.patience`` the best ones.
      compute: devices and memory.
      processes: that train together.
      save: checkpoints.
      resume: by default, go on with the run in run_dir, or with the newest unfinished one of this configuration under
        runs/ that has a checkpoint. auto: or under runs/ with one that was planned with other epochs; a finished one is
        trained further if there are more of them. never: train in a new directory only. A number: go on from the
        checkpoint of this step and give up later ones (0: begin anew).
      log_every: steps between two lines of metrics, printed and in metrics.jsonl; by default some fifty in a run.
      log: where metrics go beside metrics.jsonl.
      run_dir: where the run is written; by default a new directory under runs/.
      cache_dir: where trained bases and converted data are kept.
    """

    name: str
    task: TaskConfig
    model: NetworkConfig
    data: DataConfig
    lora: LoraConfig
    mode: Mode = "lora"
    seed: int = 0
    base: FitConfig | None = None
    fit: FitConfig = FitConfig()
    learning_rate: LearningRates = LearningRates()
    eval_every: int = 1
    eval_every_steps: int | None = None
    eval_batch_size: int = 64
    keep: Literal["last", "best"] | None = None
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    processes: ProcessesConfig = ProcessesConfig()
    save: SaveConfig = SaveConfig()
    resume: Literal["auto", "never"] | int | None = None
    log_every: int | None = None
    log: tuple[Writer, ...] = ()
    run_dir: Path | None = None
    cache_dir: Path = field(default_factory=default_cache_dir)

"""What can be done with runs or a checkpoint: predict, generate, eval, export, report, inspect.

The parameters of these functions are the flags of the commands, and their docstrings are the help.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from scipy.special import softmax

import jlora
from jlora import models, peft
from jlora._paths import bullets
from train import compare, data, report, store
from train.batches import Ragged, batch_of, ordered_rows
from train.config import ConfigError, Pretrained, SequenceClassification, TrainConfig
from train.evaluate import make_measure
from train.job import bucket_lengths
from train.networks import check_tokens, read_settings
from train.parallel import Jit
from train.rundir import changes
from train.runs import Run, open_run
from train.tasks import Task
from train.tasks.classify import TextRegression, Texts
from train.tasks.language import LanguageModel

_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
RunDir = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def predict(run: RunDir, text: tyro.conf.UseAppendAction[tuple[str, ...]] = (), file: Path | None = None) -> None:
    """Print each text with the label that the adapted model gives it and the label's probability, separated by tabs.

    Args:
      run: a run directory.
      text: a text; give the flag several times for several. A pair of texts is separated by a tab.
      file: a file of texts instead: .txt with one on each line, or a table with the run's column of texts.
    """
    if text and file is not None:
        raise ConfigError("predict: got --text and --file; expected one of them")
    opened = open_run(run)
    task = opened.task
    if not isinstance(task, Texts):
        raise ConfigError(f"predict: {run} was not trained on texts to be labelled; see `generate` and `eval`")
    texts, pairs = _texts(list(text), file, opened.config)
    if not texts:
        raise ConfigError('predict: no text; pass --text "..." (several times for several), or --file FILE')
    examples = task.tokens(texts, pairs)
    check_tokens(opened.network, {"": examples})
    forward = jax.jit(lambda tree, inputs: jlora.lora(opened.network.forward)(tree, inputs))
    outputs = np.empty((len(texts), max(len(task.labels), 1)), np.float32)
    buckets = bucket_lengths(opened.config, {"": examples})
    for rows, own in ordered_rows(examples, min(len(texts), 64)):
        found = forward(opened.tree, task.inputs(batch_of(examples, rows, buckets)))
        outputs[rows[:own]] = np.asarray(found, np.float32)[:own]
    for i, (one, scores) in enumerate(zip(texts, outputs, strict=True)):
        # One line for each text, whatever is in it.
        shown = "\t".join(part.translate(_ESCAPES) for part in ([one] if pairs is None else [one, pairs[i]]))
        if isinstance(task, TextRegression):
            print(f"{shown}\t{scores[0]:.4f}")
        else:
            print(f"{shown}\t{task.labels[scores.argmax()]}\t{softmax(scores).max():.4f}")


def _texts(texts: list[str], file: Path | None, config: TrainConfig) -> tuple[list[str], list[str] | None]:
    task = config.task
    assert isinstance(task, SequenceClassification)
    if file is None:
        if task.pair is None:
            return texts, None
        split = [text.split("\t") for text in texts]
        if wrong := [text for text, parts in zip(texts, split, strict=True) if len(parts) != 2]:
            raise ConfigError(f"predict: expected pairs of texts separated by a tab, got {wrong}")
        return [parts[0] for parts in split], [parts[1] for parts in split]
    table = data.read(str(file), config.cache_dir, "file", quoted_tsv=config.data.quoted_tsv)
    if file.suffix == ".txt" and task.pair is None:
        return [line for line in data.column(table, "text", "file") if line.strip()], None
    pairs = None if task.pair is None else data.texts(table, task.pair, "file")
    return data.texts(table, task.text, "file"), pairs


def generate(
    run: RunDir,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Print each prompt's continuation by the adapted language model.

    Args:
      run: a run directory.
      prompt: a prompt; give the flag several times for several.
      file: a text file with one prompt on each line instead.
      max_new_tokens: the length of a continuation, at most.
      temperature: 0 takes the likeliest token each time; higher is more random.
      top_p: sample from the likeliest tokens that together have this probability.
      seed: of the sampling.
    """
    opened = open_run(run)
    task, model = opened.task, opened.network.model
    if not isinstance(task, LanguageModel) or model is None:
        raise ConfigError(f"generate: {run} was not trained as a language model; see `predict`")
    if prompt and file is not None:
        raise ConfigError("generate: got --prompt and --file; expected one of them")
    prompts = list(prompt) if file is None else file.read_text().splitlines()
    prompts = [line for line in prompts if line.strip()]
    if not prompts:
        raise ConfigError('generate: no prompt; pass --prompt "..." (several times for several), or --file FILE')
    tokens = [task.prompt_tokens(one) for one in prompts]
    examples = {
        "input_ids": Ragged(tokens, task.pad, left=True),
        "attention_mask": Ragged([[1] * len(one) for one in tokens], 0, left=True),
    }
    answers: list[str] = [""] * len(prompts)
    check_tokens(opened.network, {"": examples})
    apply = jlora.lora(model.apply)
    key, ends = jax.random.key(seed), _ends(opened)
    for i, (rows, own) in enumerate(ordered_rows(examples, min(len(prompts), 16))):
        batch = batch_of(examples, rows, _round_up(max(map(len, tokens))))
        new = models.generate(
            model,
            opened.tree,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            key=jax.random.fold_in(key, i),
            eos_token_id=ends,
            pad_token_id=task.pad,
            apply=apply,
        )
        for row, line in zip(rows[:own], np.asarray(new)[:own], strict=True):
            answers[row] = task.tokenizer.decode(line, skip_special_tokens=True)
    for one, answer in zip(prompts, answers, strict=True):
        print(f"> {one}\n{answer}\n")


def _ends(run: Run) -> list[int] | None:
    """The tokens after which an answer has ended: those of its task, and those that the checkpoint generates until."""
    assert isinstance(run.config.model, Pretrained) and isinstance(run.task, LanguageModel)
    stated = read_settings(run.config.model, "generation_config.json").get("eos_token_id")
    found = {*run.task.ends, *(stated if isinstance(stated, list) else [stated])} - {None}
    return sorted(found) or None


def _round_up(length: int) -> tuple[int, ...]:
    return tuple(range(32, length + 32, 32))


def evaluate(run: RunDir, source: str | None = None, limit: int | None = None) -> None:
    """Print the figures of the adapted model on validation examples.

    Args:
      run: a run directory.
      source: other examples than the run's own validation examples: a file, a folder or a dataset's name.
      limit: use so many, the first ones.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"eval: got --limit {limit}, expected a whole number >= 1")
    opened = open_run(run)
    config = opened.config
    if source is None:
        table = data.load(config.data, config.cache_dir)["validation"]
    else:
        table = data.read(source, config.cache_dir, "source", quoted_tsv=config.data.quoted_tsv)
    table = table if limit is None else table.keep(range(min(limit, len(table))), f"beyond the limit of {limit:,}")
    found = measured(opened, table)
    if table.account is not None:
        print(table.account.line())
        if source is None and (differing := changes(run, {"validation": table.account.to_json()})):
            print(f"these are not the examples of the run:{bullets(differing)}")
    for name, figures in found.items():
        print(f"{name}: {report.figures_line(figures)}")


def measured(run: Run, table: data.Table) -> dict[str, dict[str, float]]:
    """The adapted model's figures on a table's examples, by domain."""
    task: Task = run.task
    sets = {name or "validation": examples for name, examples in task.encode(table).items()}
    check_tokens(run.network, sets)
    measure = make_measure(
        Jit(), run.network.forward, task, run.config.eval_batch_size, bucket_lengths(run.config, sets)
    )
    return {name: task.metrics(measure(run.params, run.adapters, examples)) for name, examples in sets.items()}


def export(
    run: RunDir, to: Literal["peft", "hf", "orbax"] = "peft", out: Path | None = None, uniform_rank: bool = False
) -> None:
    """Write what a run learnt for other programs.

    Args:
      run: a run directory.
      to: peft: the adapters alone, for PyTorch's peft and for vLLM. hf: the merged model as a Hugging Face checkpoint,
        with tokenizer and model card. orbax: the merged parameters for the unmodified JAX model.
      out: where to; by default a folder of that name in the run directory.
      uniform_rank: for peft: one rank and scale for all weights, as vLLM wants; the update is the same.
    """
    opened = open_run(run)
    folder = out or run / to
    network, config = opened.network, opened.config
    if to == "orbax":
        if folder.exists():
            raise ConfigError(f"export: {folder} is there already; pass --out with a new folder")
        store.save_tree(folder, jax.jit(jlora.merge)(opened.params, opened.adapters))
    elif network.model is None:
        raise ConfigError(f"export: a {type(config.model).__name__} exists in JAX alone; pass --to orbax")
    elif to == "peft":
        peft.save(
            folder,
            models.names(network.model),
            opened.params,
            opened.adapters,
            config.lora,
            uniform_rank=uniform_rank,
            base_model=network.source,
            task_type={"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM"}.get(type(config.task).__name__),
        )
        if network.tokenizer is not None:
            network.tokenizer.save_pretrained(folder)
    else:
        lost = models.export(
            folder,
            network.model,
            opened.params,
            opened.adapters,
            tokenizer=network.tokenizer or _pictures(opened),
            base_model=network.source,
        )
        print(lost)
    print(f"written to {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


def _pictures(run: Run) -> str | None:
    """The checkpoint, if it says how it wants its images."""
    assert isinstance(run.config.model, Pretrained)
    return run.network.source if read_settings(run.config.model, "preprocessor_config.json") else None


def inspect(
    checkpoint: Annotated[str, tyro.conf.Positional],
    lora: jlora.LoraConfig = jlora.LoraConfig(),  # noqa: B008  (frozen)
    task: models.Task | None = None,
    labels: int | None = None,
    revision: str | None = None,
) -> None:
    """Show what of a checkpoint would be adapted, from its config.json alone.

    Args:
      checkpoint: a folder, or the id of a model on the hub.
      lora: what would be adapted, and how.
      task: what the network ends in; by default that of the checkpoint.
      labels: of a classifier, how many.
      revision: of a model on the hub.
    """
    if (folder := Path(checkpoint)).is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"inspect: {checkpoint} has no config.json; expected the folder of a checkpoint")
    model = models.build(checkpoint, task=task, labels=labels, revision=revision)
    params = models.abstract(model)
    try:
        plan = jlora.plan(params, lora, jlora.trace(model.apply, params, models.example_inputs(model)))
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error
    print(f"{checkpoint}: {type(model).__name__}\n\n{plan}")


USER_ERRORS = (ConfigError, models.ModelError, models.TensorError, peft.PeftError)
"""What these raise when they cannot do what was asked."""

COMMANDS = {
    "predict": predict,
    "generate": generate,
    "eval": evaluate,
    "export": export,
    "report": compare.report,
    "inspect": inspect,
}

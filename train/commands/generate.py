"""The command that continues prompts, with one run or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import tyro

import jlora
from jlora import models
from train.commands.inputs import Inputs, RunPaths, check_no_errors, read_inputs, text_of
from train.commands.one_base import open_runs
from train.commands.results import check_new, write_results
from train.compute.compilation_cache import compilation_cache
from train.config import ConfigError
from train.data.batches import batch_of, ordered_rows
from train.data.ragged import Ragged
from train.networks.network import check_tokens
from train.rundir.finished import FinishedRun
from train.tasks.chat import Message
from train.tasks.conversations import messages_of, tools_of
from train.tasks.language import LanguageModel

LENGTH_STEP = 32
"""Prompts are padded to multiples of this, so that few shapes are compiled."""
BATCH_SIZE = 16
BASE = "base"
"""The name of the model without adapters, beside the names of runs."""

Prompt: TypeAlias = str | list[Message]


def generate(
    runs: RunPaths,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    file: Path | None = None,
    column: str | None = None,
    adapter: str = "adapter",
    out: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Print each prompt with its completion by the adapted language model.

    With several runs on one base, the base is in memory once, and a batch mixes their adapters.

    Args:
      runs: Run directory; or several, with a table of prompts that names one for each.
      prompt: Prompt to continue.
      file: File of prompts: .txt with a prompt on each line, a table (jsonl, json, csv, tsv, parquet), or - for the
        lines of standard input. Blank lines keep their place in the output.
      column: Column of a table. Default: the run's column of messages, prompts or texts. A final message of the
        assistant is dropped. Tools are read from the run's column of tools, if the table has it.
      adapter: Column of a table that names the run of each prompt, by the name or path of its directory, or as base for
        the model without adapters. Only with several runs.
      out: Write to this new .jsonl file instead: prompt, completion and row (from 1), in the order of the input.
      max_new_tokens: Maximum number of tokens to generate.
      temperature: Sampling temperature; 0 is greedy decoding.
      top_p: Sample from the most likely tokens with this total probability.
      seed: Sampling seed.
    """
    check_new(out)
    if not runs:
        raise ConfigError("generate: got no run; pass one as `python -m train generate RUN`")
    opened, *others = open_runs(runs, "generate")
    task, model = opened.task, opened.network.model
    if not isinstance(task, LanguageModel) or model is None:
        raise ConfigError(f"{opened.folder} was not trained as a language model; see `predict`")
    default = task.config.messages or task.config.prompt or task.config.text
    assert default is not None
    inputs = read_inputs(
        prompt,
        file,
        (column or default,),
        opened.config,
        flag="--prompt",
        by_column=column is not None,
        more=(task.config.tools, adapter),
    )
    ids = _adapter_ids(runs, inputs, adapter) if others else None
    prompts = _prompts(inputs, task, messages=column in (None, task.config.messages))
    tokens = _tokens(model, task, inputs, prompts, max_new_tokens)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    stacked = jlora.stack([run.adapters for run in (opened, *others)]) if others else {}

    def tree(rows: np.ndarray) -> Any:
        """The base with the adapters of these prompts, of those that are not blank."""
        return opened.tree if ids is None else jlora.attach(opened.params, jlora.select(stacked, ids[rows]))

    with compilation_cache(opened.config):
        found = completions(opened, task, tokens, jax.random.key(seed), tree, **sampling)
    by_row = dict(zip(inputs.not_blank, found, strict=True))
    _write(out, prompts, [by_row.get(i, "") for i in range(len(prompts))])


def completions(
    run: FinishedRun,
    task: LanguageModel,
    tokens: Sequence[list[int]],
    key: Any,
    tree: Callable[[np.ndarray], Any],
    **sampling: Any,
) -> list[str]:
    """The completion of each prompt, as text, by the model with the parameters ``tree(rows)`` for a batch of rows."""
    model: Any = run.network.model
    examples = {
        "input_ids": Ragged.of(tokens, task.pad, left=True),
        "attention_mask": Ragged.of([[1] * len(one) for one in tokens], left=True),
    }
    check_tokens(run.network, {"": examples})
    ends, closing = end_of_answers(model, task)
    apply = jlora.lora(model.apply)
    found = [""] * len(tokens)
    for i, (rows, own) in enumerate(ordered_rows(examples, min(len(tokens), BATCH_SIZE))):
        batch = batch_of(examples, rows, range(LENGTH_STEP, max(map(len, tokens)) + LENGTH_STEP, LENGTH_STEP))
        new = models.generate(
            model,
            tree(rows),
            batch["input_ids"],
            batch["attention_mask"],
            key=jax.random.fold_in(key, i),
            eos_token_id=sorted(ends),
            pad_token_id=task.pad,
            apply=apply,
            **sampling,
        )
        for row, ids in zip(rows[:own], np.asarray(new)[:own].tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            text = task.tokenizer.decode(ids[:end], skip_special_tokens=True)
            found[row] = text.split(closing)[0].rstrip() if closing else text
    return found


def end_of_answers(model: Any, task: LanguageModel) -> tuple[set[int], str]:
    """The tokens that end an answer, and a text that does, possibly empty.

    The tokens are the task's and the model's own. The text closes an answer in a chat template that has no
    special token for it.
    """
    ends = {*task.ends, *model.config.end_tokens}
    if task.chat is None or task.chat.end is not None:
        return ends, ""
    answer = "jlora-answer"
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        _, shown, closing = task.chat.whole(talk).text.rpartition(answer)
    except ConfigError:  # a template for other messages
        return ends, ""
    return ends, closing.strip() if shown else ""


def _adapter_ids(runs: Sequence[Path], inputs: Inputs, column: str) -> np.ndarray:
    """For each input that is not blank, the index of its run; -1 for the base."""
    if column not in inputs.more:
        raise ConfigError(
            f"got {len(runs)} runs, and {inputs.source or 'prompts from flags'} without a column {column!r} that names "
            "one for each prompt; pass one run, or a table with that column, or --adapter with another"
        )
    names = [run.resolve().name for run in runs]
    known = {str(run): i for i, run in enumerate(runs)} | {BASE: -1}
    known |= {name: i for i, name in enumerate(names) if names.count(name) == 1 and name != BASE}
    given = {i: str(inputs.more[column][i]) for i in inputs.not_blank}
    wrong = {i: f"{name!r:.80} in column {column!r}" for i, name in given.items() if name not in known}
    check_no_errors(wrong, inputs, f"Expected the name of a run: {', '.join(known)}")
    return np.asarray([known[name] for name in given.values()], np.int32)


def _prompts(inputs: Inputs, task: LanguageModel, *, messages: bool) -> list[Prompt | None]:
    """The prompts; None for blank inputs. ``messages``: whether the column of a table holds conversations."""
    conversations = messages and task.config.messages is not None and inputs.unit == "row"
    return [
        None if row is None else _prompt(row[0], inputs.where(i), task, conversations)
        for i, row in enumerate(inputs.rows)
    ]


def _prompt(value: Any, where: str, task: LanguageModel, conversation: bool) -> Prompt:
    """A text, or the messages of a conversation up to the ones for the assistant to answer."""
    if not conversation and not isinstance(value, list):
        return text_of(value, where)
    if task.chat is None:
        raise ConfigError(f"{where}: got {value!r:.80}; expected a string: the run was not trained on conversations")
    try:
        found = messages_of(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    asked = found[:-1] if found[-1]["role"] == "assistant" else found
    if not asked:
        raise ConfigError(f"{where}: got {value!r:.80}; expected a message that can be answered")
    return asked


def _tokens(
    model: Any, task: LanguageModel, inputs: Inputs, prompts: Sequence[Prompt | None], new: int
) -> list[list[int]]:
    """The tokens of the prompts that are not blank; raises if one exceeds the network's positions."""
    found, errors = [], {}
    tools = inputs.more.get(task.config.tools or "", [None] * len(prompts))
    most = model.config.max_length
    for i, prompt in enumerate(prompts):
        if prompt is None:
            continue
        try:
            found.append(task.prompt_tokens(prompt, tools_of(tools[i])))
        except ConfigError as error:
            raise ConfigError(f"{inputs.where(i)}: {error}") from error
        if not found[-1]:
            errors[i] = "the tokenizer returns no tokens for it"
        elif most is not None and len(found[-1]) + new > most:
            errors[i] = f"{len(found[-1])} prompt and {new} new tokens; the network has {most} positions"
    check_no_errors(errors, inputs, "Expected shorter prompts; or pass a smaller --max-new-tokens")
    return found


def _write(out: Path | None, prompts: Sequence[Prompt | None], answers: Sequence[str]) -> None:
    """Print the prompts and their completions, or write them to a new file."""
    if out is None:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"{_quoted(prompt)}\n{answer}\n")
        return
    write_results(
        out,
        (
            {"messages" if isinstance(prompt, list) else "prompt": prompt or "", "completion": answer, "row": i + 1}
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ),
    )


def _quoted(prompt: Prompt | None) -> str:
    """A prompt, each line after ``> ``."""
    if isinstance(prompt, list):
        prompt = "\n".join(f"{one['role']}: {one.get('content', '')}" for one in prompt)
    return "\n".join(f"> {line}" for line in (prompt or "").split("\n"))

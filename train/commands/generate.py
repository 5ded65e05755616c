"""The command that continues prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import jlora
from jlora import models
from train.commands.inputs import Inputs, RunPath, read_inputs, refuse_rows, text_of
from train.commands.results import check_new, write_results
from train.config import ConfigError
from train.data.batches import Ragged, batch_of, ordered_rows
from train.networks.network import check_tokens
from train.rundir.finished import FinishedRun, open_run
from train.tasks.conversations import messages_of, tools_of
from train.tasks.language import LanguageModel

STEP = 32
"""Prompts are padded to multiples of so many tokens, so that few shapes are compiled."""


def generate(
    run: RunPath,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    file: Path | None = None,
    column: str | None = None,
    out: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Print each prompt's continuation by the adapted language model, until its end token.

    Args:
      run: a run directory.
      prompt: a prompt; give the flag several times for several.
      file: a file of prompts instead: .txt with one on each line, a table (jsonl, json, csv, tsv, parquet), or - for
        the lines of the standard input. Blank lines keep their place.
      column: of a table, by default the run's column of messages, prompts or texts. Of messages, the last one is left
        out if it is the assistant's. Tools are read from the run's column of tools, where the table has it.
      out: write a new .jsonl file instead: prompt, completion and row (from 1), in the order of the input.
      max_new_tokens: the length of a continuation, at most.
      temperature: 0 takes the likeliest token each time; higher is more random.
      top_p: sample from the likeliest tokens that together have this probability.
      seed: of the sampling.
    """
    check_new(out)
    opened = open_run(run)
    task, model = opened.task, opened.network.model
    if not isinstance(task, LanguageModel) or model is None:
        raise ConfigError(f"generate: {run} was not trained as a language model; see `predict`")
    config = task.config
    own = config.messages or config.prompt or config.text
    assert own is not None
    try:
        inputs = read_inputs(
            prompt,
            file,
            (column or own,),
            opened.config,
            flag="--prompt",
            chosen=column is not None,
            beside=config.tools,
        )
        messages = config.messages is not None and column in (None, config.messages) and inputs.unit == "row"
        prompts = [
            None if row is None else _prompt(row[0], inputs.where(i), task, messages)
            for i, row in enumerate(inputs.rows)
        ]
        tokens = _tokens(model, task, inputs, prompts, max_new_tokens)
    except ConfigError as error:
        raise ConfigError(f"generate: {error}") from error
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    found = dict(zip(inputs.asked, continued(opened, task, tokens, jax.random.key(seed), **sampling), strict=True))
    answers = [found.get(i, "") for i in range(len(prompts))]
    if out is None:
        for one, answer in zip(prompts, answers, strict=True):
            print(f"{_quoted(one)}\n{answer}\n")
        return
    write_results(
        out,
        (
            {"messages" if isinstance(one, list) else "prompt": one or "", "completion": answer, "row": i + 1}
            for i, (one, answer) in enumerate(zip(prompts, answers, strict=True))
        ),
    )


def continued(
    opened: FinishedRun, task: LanguageModel, tokens: Sequence[list[int]], key: Any, **sampling: Any
) -> list[str]:
    """What follows each prompt, as text."""
    model: Any = opened.network.model
    examples = {
        "input_ids": Ragged(tokens, task.pad, left=True),
        "attention_mask": Ragged([[1] * len(one) for one in tokens], 0, left=True),
    }
    check_tokens(opened.network, {"": examples})
    ends, closing = end_of_answers(model, task)
    apply = jlora.lora(model.apply)
    answers = [""] * len(tokens)
    for i, (rows, own) in enumerate(ordered_rows(examples, min(len(tokens), 16))):
        batch = batch_of(examples, rows, range(STEP, max(map(len, tokens)) + STEP, STEP))
        new = models.generate(
            model,
            opened.tree,
            batch["input_ids"],
            batch["attention_mask"],
            key=jax.random.fold_in(key, i),
            eos_token_id=sorted(ends),
            pad_token_id=task.pad,
            apply=apply,
            **sampling,
        )
        for row, line in zip(rows[:own], np.asarray(new)[:own].tolist(), strict=True):
            end = next((place for place, token in enumerate(line) if token in ends), len(line))
            answer = task.tokenizer.decode(line[:end], skip_special_tokens=True)
            answers[row] = answer.split(closing)[0].rstrip() if closing else answer
    return answers


def end_of_answers(model: Any, task: LanguageModel) -> tuple[set[int], str]:
    """After what an answer has ended: tokens, and a text, which may be empty.

    The tokens are the task's and the model's own. Where the chat template closes an answer with no special token, the
    text is what does.
    """
    ends = {*task.ends, *model.config.end_tokens}
    if task.chat is None or task.chat.end is not None:
        return ends, ""
    answer = "jlora-answer"
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        _, shown, closing = task.chat.whole(talk).text.rpartition(answer)
    except ConfigError:  # one that wants other messages
        return ends, ""
    return ends, closing.strip() if shown else ""


def _prompt(value: Any, where: str, task: LanguageModel, messages: bool) -> str | list[dict[str, Any]]:
    """A text, or the messages of a conversation that are to be answered."""
    if not messages and not isinstance(value, list):
        return text_of(value, where)
    if task.chat is None:
        raise ConfigError(f"{where}: got {value!r:.80}; expected a text: the run was not trained on conversations")
    try:
        found = messages_of(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    asked = found[:-1] if found[-1]["role"] == "assistant" else found
    if not asked:
        raise ConfigError(f"{where}: got {value!r:.80}; expected a message that can be answered")
    return asked


def _tokens(
    model: Any, task: LanguageModel, inputs: Inputs, prompts: Sequence[str | list[dict[str, Any]] | None], new: int
) -> list[list[int]]:
    """The tokens of the prompts that there are; raises if the network has not enough positions for them."""
    found, faults = [], {}
    most = model.config.max_length
    for i, one in enumerate(prompts):
        if one is None:
            continue
        try:
            found.append(task.prompt_tokens(one, tools_of(inputs.beside[i])))
        except ConfigError as error:
            raise ConfigError(f"{inputs.where(i)}: {error}") from error
        if not found[-1]:
            faults[i] = "the tokenizer makes no token of it"
        elif most is not None and len(found[-1]) + new > most:
            faults[i] = f"{len(found[-1])} prompt and {new} new tokens; the network has {most} positions"
    refuse_rows(faults, inputs, "Expected shorter prompts; or pass a smaller --max-new-tokens")
    return found


def _quoted(prompt: str | list[dict[str, Any]] | None) -> str:
    """A prompt behind ``> ``, line by line."""
    if isinstance(prompt, list):
        prompt = "\n".join(f"{one['role']}: {one.get('content', '')}" for one in prompt)
    return "\n".join(f"> {line}" for line in (prompt or "").split("\n"))

"""The command that writes a run for other programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax

import jlora
from jlora import models, peft
from jlora.files.buckets import is_in_bucket, located, names_below, upload_folder
from jlora.files.hub_files import MODEL_CARD
from train.commands.inputs import RunPath
from train.config import CausalLM, ConfigError, Pretrained, SequenceClassification
from train.networks.tokenizers import exported_files
from train.rundir.arrays import save_tree
from train.rundir.finished import FinishedRun, open_run

TASK_TYPES = {"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM"}
"""PEFT's names for the tasks."""
AUTO_CLASSES = {
    "SequenceClassification": "AutoModelForSequenceClassification",
    "ImageClassification": "AutoModelForImageClassification",
    "CausalLM": "AutoModelForCausalLM",
}
"""The classes of transformers that make the networks."""
_CARD_START = """\
---
library_name: peft
tags:
- lora
- jlora
"""


def export(
    run: RunPath,
    to: Literal["peft", "hf", "orbax"] = "peft",
    out: Path | None = None,
    uniform_rank: bool = False,
    dequantize: bool = False,
) -> None:
    """Write the adapters or the merged model of a run for other programs.

    Args:
      run: Run directory.
      to: Format. peft: adapters for PyTorch's PEFT and for vLLM, with a
        README.md that loads them. hf: the merged model as a Hugging Face checkpoint with
        tokenizer and model card. orbax: merged parameters for the unmodified JAX model.
      out: Folder to write to. Default: a folder named after the format in the run directory.
      uniform_rank: Write one rank and scale for all weights, as vLLM requires (peft only). The update stays the same.
      dequantize: Merge into the dequantized weights of a quantized base (hf and orbax).
    """
    opened = open_run(run)
    if to != "peft" and (scheme := opened.network.scheme) is not None:
        if not dequantize:
            raise ConfigError(
                f"the base of {opened.folder} is quantized ({scheme}), and an update is lost in few bits; pass "
                "--dequantize to merge into its dequantized weights, or --to peft for the adapters alone"
            )
        opened = dataclasses.replace(opened, params=jlora.dequantize(opened.params))
    target = located(out) if out else opened.folder / to
    with local_folder(target) as folder:
        _export(opened, to, folder, uniform_rank)
        names = ", ".join(sorted(file.name for file in folder.iterdir()))
    print(f"written to {target}: {names}")


@contextlib.contextmanager
def local_folder(target: Path) -> Iterator[Path]:
    """A local folder to write to: ``target``; or one whose files are uploaded to it, a folder in a bucket."""
    if not is_in_bucket(target):
        yield target
        return
    if names_below(target):
        raise ConfigError(f"{target} already exists; pass --out with a new folder")
    with tempfile.TemporaryDirectory(prefix="jlora-") as drafts:
        folder = Path(drafts) / target.name
        yield folder
        upload_folder(folder, target)


def _export(opened: FinishedRun, to: str, folder: Path, uniform_rank: bool) -> None:
    if to == "orbax":
        _export_orbax(opened, folder)
    elif opened.network.model is None:
        raise ConfigError(
            f"got --to {to}, and a {type(opened.config.model).__name__} exists in JAX only; pass --to orbax"
        )
    elif to == "peft":
        _export_peft(opened, folder, uniform_rank)
    else:
        _export_hf(opened, folder)


def _export_orbax(run: FinishedRun, folder: Path) -> None:
    if folder.exists():
        raise ConfigError(f"{folder} already exists; pass --out with a new folder")
    save_tree(folder, jax.jit(jlora.merge)(run.params, run.adapters))


def _export_peft(run: FinishedRun, folder: Path, uniform_rank: bool) -> None:
    network, config = run.network, run.config
    assert network.model is not None and isinstance(config.model, Pretrained)
    peft.save(
        folder,
        models.tensor_names(network.model),
        run.params,
        run.adapters,
        config.lora,
        uniform_rank=uniform_rank,
        base_model=network.source,
        task_type=TASK_TYPES.get(type(config.task).__name__),
    )
    if network.tokenizer is not None:
        exported_files(config.model, config.task, network.tokenizer).save_pretrained(folder)
    card = folder / MODEL_CARD
    if not card.exists() or card.read_text(encoding="utf-8").startswith(_CARD_START):
        card.write_text(_peft_card(run, folder), encoding="utf-8")
        print(f"{card} shows how to load it")


def _peft_card(run: FinishedRun, folder: Path) -> str:
    """How to load adapters in PyTorch. Their format has no labels; the head of the base must have as many of them."""
    task, source = run.config.task, run.network.source
    labels = list(getattr(task, "labels", None) or ())
    auto = AUTO_CLASSES[type(task).__name__]
    options = [repr(str(source))]
    if not isinstance(task, CausalLM):
        options.append(f"num_labels={len(labels) or 1}")
    if (pad := getattr(run.network.tokenizer, "pad_token_id", None)) is not None and isinstance(
        task, SequenceClassification
    ):
        options.append(f"pad_token_id={pad}")
    if labels:
        options += ["id2label=dict(enumerate(labels))", "label2id={name: i for i, name in enumerate(labels)}"]
    lines = [
        *_CARD_START.splitlines(),
        f"base_model: {json.dumps(str(source), ensure_ascii=False)}",
        "---",
        "",
        f"# {folder.resolve().name}",
        "",
        f"Low-rank adapters of `{source}`, trained with jlora.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        *([f"labels = {labels!r}"] if labels else []),
        f"base = {auto}.from_pretrained(",
        *(f"    {option}," for option in options),
        ")",
        f"model = PeftModel.from_pretrained(base, {str(folder)!r})",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _export_hf(run: FinishedRun, folder: Path) -> None:
    network, config = run.network, run.config
    assert network.model is not None and isinstance(config.model, Pretrained)
    rounding = models.export(
        folder,
        network.model,
        run.params,
        run.adapters,
        tokenizer=exported_files(config.model, config.task, network.tokenizer),
        base_model=network.source,
    )
    print(rounding)

"""The command that writes a run for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax

import jlora
from jlora import models, peft
from train.commands.inputs import RunPath
from train.config import ConfigError, Pretrained
from train.networks.tokenizers import exported_files
from train.rundir.arrays import save_tree
from train.rundir.finished import FinishedRun, open_run

TASK_TYPES = {"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM"}
"""PEFT's names for the tasks."""


def export(
    run: RunPath, to: Literal["peft", "hf", "orbax"] = "peft", out: Path | None = None, uniform_rank: bool = False
) -> None:
    """Write the adapters or the merged model of a run for other programs.

    Args:
      run: Run directory.
      to: Format. peft: adapters for PyTorch's PEFT and for vLLM. hf: the merged model as a Hugging Face checkpoint with
        tokenizer and model card. orbax: merged parameters for the unmodified JAX model.
      out: Folder to write to. Default: a folder named after the format in the run directory.
      uniform_rank: Write one rank and scale for all weights, as vLLM requires (peft only). The update stays the same.
    """
    opened = open_run(run)
    folder = out or run / to
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
    print(f"written to {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


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

"""The command that writes what was learnt for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax

import jlora
from jlora import models, peft
from train.commands.inputs import RunPath
from train.config import ConfigError, Pretrained
from train.networks.network import read_settings
from train.rundir.arrays import save_tree
from train.rundir.finished import FinishedRun, open_run


def export(
    run: RunPath, to: Literal["peft", "hf", "orbax"] = "peft", out: Path | None = None, uniform_rank: bool = False
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
        save_tree(folder, jax.jit(jlora.merge)(opened.params, opened.adapters))
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


def _pictures(run: FinishedRun) -> str | None:
    """The checkpoint, if it says how it wants its images."""
    assert isinstance(run.config.model, Pretrained)
    return run.network.source if read_settings(run.config.model, "preprocessor_config.json") else None

"""The command that writes adapters from a fully fine-tuned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

import jlora
from jlora import models, peft
from train.commands.export import TASK_TYPES, local_folder
from train.config import ConfigError


def extract(
    base: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")],
    tuned: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED")],
    rank: int | None = None,
    energy: float | None = None,
    to: Literal["peft"] = "peft",
    out: Path = Path("extracted"),
    lora: jlora.LoraConfig | None = None,
    niter: int | None = None,
    seed: int = 0,
) -> None:
    """Write adapters that turn a checkpoint into its full fine-tune, and show the energy that they keep. Reads one
    leaf at a time.

    Args:
      base: Checkpoint before the fine-tuning: folder, or id of a model on the hub.
      tuned: Checkpoint after it.
      rank: Rank of every weight.
      energy: In place of a rank, the share of each weight's squared change to keep, such as 0.9.
      to: Format. peft: for PyTorch's PEFT and for vLLM.
      out: Folder to write to.
      lora: What gets factors and what is taken whole. Default: factors for matrices and tables; the rest whole.
      niter: Randomized SVDs with this many subspace iterations, for large weights.
      seed: Of these.
    """
    if (rank is None) == (energy is None) and (lora is None or energy is not None):
        raise ConfigError("extract: pass either --rank 16 or --energy 0.9")
    key = None if niter is None else jax.random.key(seed)
    try:
        found = models.extract(base, tuned, lora, rank=rank, energy=energy, niter=niter, key=key)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    names = models.tensor_names(found.model)
    task = next((task for end, task in TASK_TYPES.items() if names.class_name.endswith(f"For{end}")), None)
    if task is None and names.class_name.endswith("LMHeadModel"):
        task = "CAUSAL_LM"
    with local_folder(out) as folder:
        peft.save(folder, names, found.params, found.adapters, found.config, base_model=base, task_type=task)
    whole = sum(not isinstance(value, jlora.LoraFactors) for value in found.adapters.values())
    print(f"{found.kept}\ntaken whole: {whole} leaves\nwritten to {out}")

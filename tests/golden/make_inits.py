"""What peft's initializations give for a small network; run by hand where torch, peft and bitsandbytes are installed:

    python tests/golden/make_inits.py

`tests/inits/test_references.py` compares `jlora.decompose` with them, and with new ones where torch is installed.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "inits.safetensors"
LAYERS = ("up", "down")


def _loftq(rounds: int) -> dict[str, Any]:
    return {"loftq_config": {"loftq_bits": 4, "loftq_iter": rounds}}


CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 7},
    "pissa-rslora": {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 7, "use_rslora": True},
    "olora": {"init_lora_weights": "olora", "r": 3, "lora_alpha": 5},
    "loftq-1": {"init_lora_weights": "loftq", "r": 4, "lora_alpha": 4, **_loftq(1)},
    "loftq-3": {"init_lora_weights": "loftq", "r": 4, "lora_alpha": 4, **_loftq(3)},
    "corda": {"init_lora_weights": "corda", "r": 4, "lora_alpha": 6, "corda_config": {"corda_method": "ipm"}},
    "corda_kpm": {"init_lora_weights": "corda", "r": 4, "lora_alpha": 6, "corda_config": {"corda_method": "kpm"}},
    "eva": {"init_lora_weights": "eva", "r": 3, "lora_alpha": 6, "eva_config": {"rho": 2.0}},
    "eva-1": {"init_lora_weights": "eva", "r": 3, "lora_alpha": 6, "eva_config": {"rho": 1.0}},
    "eva-rslora": {
        "init_lora_weights": "eva", "r": 3, "lora_alpha": 6, "use_rslora": True, "eva_config": {"rho": 2.0}
    },
}  # fmt: skip
"""The arguments of ``peft.LoraConfig``."""


def inputs() -> np.ndarray:
    """A batch whose principal components are well apart."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(96, 16)) * 1.4 ** -np.arange(16) + rng.normal(size=16)).astype(np.float32)


def torch_model() -> Any:
    """Two linear layers, always with the same weights."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 24, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(x)))

    torch.manual_seed(0)
    return Model()


@contextlib.contextmanager
def cuda_is_the_cpu() -> Iterator[None]:
    """peft's LoftQ computes on a GPU; let it take the CPU for one, where bitsandbytes 0.50 takes the scales of the
    wrong blocks for rows that are not whole blocks."""
    import importlib

    import torch

    bnb: Any = importlib.import_module("bitsandbytes")

    def to(method: Any) -> Any:
        def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if arg == "cuda" else arg for arg in args)
            kwargs = {name: "cpu" if name == "device" and x == "cuda" else x for name, x in kwargs.items()}
            return method(self, *args, **kwargs)

        return moved

    dequantize = bnb.functional.dequantize_4bit

    def in_one_row(data: Any, state: Any) -> Any:
        shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
        return dequantize(data, state).reshape(shape)

    with (
        mock.patch.object(bnb.functional, "dequantize_4bit", in_one_row),
        mock.patch.object(torch.Tensor, "to", to(torch.Tensor.to)),
        mock.patch.object(bnb.nn.Params4bit, "to", to(bnb.nn.Params4bit.to)),
    ):
        yield


def initialized(arguments: dict[str, Any]) -> Any:
    """peft's model with fresh adapters."""
    import peft
    import torch
    from peft.tuners.lora.corda import preprocess_corda

    arguments = dict(arguments)
    for name, kind in (("corda_config", "CordaConfig"), ("eva_config", "EvaConfig")):
        if name in arguments:
            made = getattr(peft.tuners.lora.config, kind)
            arguments[name] = made(**arguments[name])
    config = peft.LoraConfig(target_modules=list(LAYERS), **arguments)
    model, x = torch_model(), torch.tensor(inputs())
    if config.init_lora_weights == "corda":
        with torch.no_grad():
            preprocess_corda(model, config, run_model=lambda: model(x))
    with cuda_is_the_cpu() if config.init_lora_weights == "loftq" else contextlib.nullcontext():
        model = peft.get_peft_model(model, config)
    if config.init_lora_weights == "eva":
        peft.initialize_lora_eva_weights(
            model,
            [x],
            forward_fn=lambda model, x: model(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    return model.base_model.model


def made() -> dict[str, np.ndarray]:
    """The weights, and of each case the residual, the factors and the scale; the codes of NF4."""
    import importlib

    functional: Any = importlib.import_module("bitsandbytes.functional")
    codes = functional.get_4bit_type("nf4", device="cpu")
    found = {"nf4": codes.numpy()}
    base = torch_model()
    found |= {f"base/{name}": getattr(base, name).weight.detach().numpy() for name in LAYERS}
    for case, arguments in CASES.items():
        model = initialized(arguments)
        for name in LAYERS:
            layer = getattr(model, name)
            if not hasattr(layer, "lora_A"):  # EVA gave it rank 0
                continue
            tensors = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}
            tensors["R"] = layer.get_base_layer().weight
            found |= {f"{case}/{name}/{key}": x.detach().float().numpy().copy() for key, x in tensors.items()}
            found[f"{case}/{name}/scale"] = np.float32(layer.scaling["default"]).reshape(1)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    save_file(made(), sys.argv[1] if sys.argv[1:] else FILE)

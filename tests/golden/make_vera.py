"""VeRA by the real peft, and what torch computes with it; run by hand where torch is installed:

    python tests/golden/make_vera.py

`tests/peft/test_peft_vera.py` compares with it, and with the live peft where there is one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "vera.safetensors"
SIZES = ((6, 10), (10, 4))
"""Inputs and outputs of the layers: neither has the most of both."""


def computed() -> dict[str, np.ndarray]:
    """Weights, peft's shared matrices and vectors, an input, the result, and the gradients of the sum of its sines."""
    import peft
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Linear(*size) for size in SIZES]
    base = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    config = peft.VeraConfig(r=3, target_modules=["0", "2"], projection_prng_key=5)
    model: Any = peft.get_peft_model(base, config).eval()
    found = {name.replace("base_model.model.", ""): value for name, value in model.named_parameters()}
    for value in (value for value in found.values() if value.requires_grad):
        torch.nn.init.normal_(value, std=0.5)
    x = torch.randn(7, SIZES[0][0])
    y = model(x)
    torch.sin(y).sum().backward()
    grads = {f"gradient of {name}": value.grad for name, value in found.items() if value.grad is not None}
    shared = {"a": model.base_model.vera_A["default"], "b": model.base_model.vera_B["default"]}
    arrays = {**found, **grads, **shared, "x": x, "y": y}
    return {name: value.detach().numpy().copy() for name, value in arrays.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    save_file(computed(), FILE)

"""What peft's `add_weighted_adapter` makes of three adapters; run by hand where torch and peft are installed:

    python tests/golden/make_algebra.py

`tests/algebra/test_weighted_references.py` compares `jlora.add_weighted` with it, and with the live peft where there is
one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "algebra.safetensors"
TARGETS = {"one": ["linear", "table", "conv"], "two": ["linear", "table", "conv"], "small": ["linear", "conv"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 3, "lora_alpha": 5},
    "two": {"r": 3, "lora_alpha": 2},
    "small": {"r": 2, "lora_alpha": 7},
}
_SAME_RANK, _ALL = ("one", "two"), ("one", "two", "small")
_DENSITY = {"density": 0.4}
CASES: dict[str, tuple[str, tuple[str, ...], tuple[float, ...], dict[str, Any]]] = {
    "linear": ("linear", _SAME_RANK, (0.6, -0.7), {}),
    "cat": ("cat", _ALL, (0.6, -0.7, 1.2), {}),
    "svd": ("svd", _ALL, (0.6, -0.7, 1.2), {}),
    "svd of rank 2": ("svd", _ALL, (0.6, -0.7, 1.2), {"svd_rank": 2}),
    "magnitude_prune": ("magnitude_prune", _SAME_RANK, (0.6, -0.7), _DENSITY),
    "magnitude_prune_svd": ("magnitude_prune_svd", _ALL, (0.6, -0.7, 1.2), _DENSITY),
    "ties": ("ties", _SAME_RANK, (0.6, 0.7), _DENSITY),
    "ties by number": ("ties", _SAME_RANK, (0.6, 0.7), {**_DENSITY, "majority_sign_method": "frequency"}),
    "ties_svd": ("ties_svd", _ALL, (0.6, -0.7, 1.2), _DENSITY),
    "ties_svd by number": ("ties_svd", _ALL, (0.6, 0.7, 1.2), {**_DENSITY, "majority_sign_method": "frequency"}),
    "dare_linear": ("dare_linear", _SAME_RANK, (0.6, -0.7), _DENSITY),
    "dare_linear_svd": ("dare_linear_svd", _ALL, (0.6, -0.7, 1.2), _DENSITY),
    "dare_ties": ("dare_ties", _SAME_RANK, (0.6, 0.7), _DENSITY),
    "dare_ties_svd": ("dare_ties_svd", _ALL, (0.6, 0.7, 1.2), _DENSITY),
}
"""Combination type, adapters, weights and options."""


def computed() -> dict[str, np.ndarray]:
    """The factors of the adapters, and for each case the updates, and the masks that were drawn, in their order."""
    import peft
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table, self.conv = nn.Linear(6, 5), nn.Embedding(7, 4), nn.Conv2d(3, 4, 2)

        def forward(self, ids: Any, images: Any) -> Any:
            return self.linear(ids), self.table(ids), self.conv(images)

    torch.manual_seed(0)
    configs = {n: peft.LoraConfig(**options, target_modules=TARGETS[n]) for n, options in ADAPTERS.items()}
    model: Any = peft.get_peft_model(Model(), configs["one"], adapter_name="one")
    for name in ("two", "small"):
        model.add_adapter(name, configs[name])
    modules = {name: getattr(model.base_model.model, name) for name in TARGETS["one"]}
    found: dict[str, Any] = {}
    for adapter, targets in TARGETS.items():
        for name in targets:
            for side in "AB":
                kind = "lora_embedding_" if name == "table" else "lora_"
                factor = getattr(modules[name], kind + side)[adapter]
                factor = factor if name == "table" else factor.weight
                nn.init.normal_(factor)
                found[f"{adapter}.{name}.{side}"] = factor
    for case, (method, adapters, weights, options) in CASES.items():
        masks, draw = [], torch.bernoulli
        with mock.patch.object(torch, "bernoulli", lambda p, m=masks, d=draw: m.append(d(p)) or m[-1]):
            model.add_weighted_adapter(list(adapters), list(weights), case, method, **options)
        found |= {f"{case}: mask {i}": mask for i, mask in enumerate(masks)}
        for name, module in modules.items():
            found[f"{case}: {name}"] = module.get_delta_weight(case)
    return {name: value.detach().numpy().astype(np.float32).copy() for name, value in found.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    save_file(computed(), FILE)

"""The encoder of `_encoder` in PyTorch, with the same weights; training steps with and without HF peft."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from benchmarks import _encoder


class _Layer(nn.Module):
    def __init__(self, shape: _encoder.Shape) -> None:
        super().__init__()
        for name in _encoder.LINEARS:
            self.add_module(name, nn.Linear(*shape.linear(name), bias=shape.bias))
        self.norm_0 = nn.LayerNorm(shape.width)
        self.norm_1 = nn.LayerNorm(shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm_0(x)
        q, k, v = (
            self.get_submodule(name)(h).unflatten(-1, (-1, 64)).transpose(1, 2) for name in ("query", "key", "value")
        )
        context = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.get_submodule("attention_out")(context.transpose(1, 2).flatten(2))
        h = self.get_submodule("up")(self.norm_1(x))
        return x + self.get_submodule("down")(functional.gelu(h, approximate="tanh"))


def _tensor(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32))


def _encoder_module(shape: _encoder.Shape, params: _encoder.Tree) -> nn.Module:
    model = nn.Sequential(*(_Layer(shape) for _ in range(shape.layers)))
    with torch.no_grad():
        for layer, module in zip(params.values(), model, strict=True):
            for name, weights in layer.items():
                part = module.get_submodule(name)
                weight = weights["kernel"].T if "kernel" in weights else weights["scale"]
                part.get_parameter("weight").copy_(_tensor(weight))
                if "bias" in weights:
                    part.get_parameter("bias").copy_(_tensor(weights["bias"]))
    return model


def _with_peft(model: nn.Module, factors: _encoder.Tree) -> nn.Module:
    rank = _encoder.rank(factors)
    config = peft.LoraConfig(r=rank, lora_alpha=int(_encoder.SCALE * rank), target_modules=list(_encoder.LINEARS))
    adapted = peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for i, layer in enumerate(factors.values()):
            for name, pair in layer.items():
                part = adapted.get_submodule(f"base_model.model.{i}.{name}")
                part.get_parameter("lora_A.default.weight").copy_(_tensor(pair["a"].T))
                part.get_parameter("lora_B.default.weight").copy_(_tensor(pair["b"].T))
    return adapted


def _stepper(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], float]:
    x, target = batch
    trainable: Iterable[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=_encoder.LEARNING_RATE, weight_decay=0.01)

    def step() -> float:
        loss = functional.mse_loss(model(x).float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def make_steps(
    shape: _encoder.Shape, params: _encoder.Tree, factors: _encoder.Tree, batch: tuple[jax.Array, jax.Array], dtype: str
) -> dict[str, Callable[[], float]]:
    """Steps for full fine-tuning and peft: functions that take one step on their own copy and return the loss."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    to = getattr(torch, dtype)
    x, target = (_tensor(part).to(to) for part in batch)
    full = _encoder_module(shape, params).to(to)
    adapted = _with_peft(_encoder_module(shape, params).to(to), factors)
    return {"torch: full": _stepper(full, (x, target)), "torch: peft": _stepper(adapted, (x, target))}

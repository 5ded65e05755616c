"""VeRA as the real peft computes it, and its expanded form in a format that peft loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import models, peft
from tests.golden.make_vera import FILE, computed
from tests.peft_cases import needs_peft, quiet
from tests.small_checkpoints import network
from tests.toys import assert_close


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["0"] + params["0/bias"]) @ params["2"] + params["2/bias"]


def assert_equals(found: dict[str, np.ndarray]) -> None:
    """Result and gradients of the vectors are those of torch, with its matrices."""
    params = {name: jnp.asarray(found[f"{name}.base_layer.weight"].T) for name in "02"}
    params |= {f"{name}/bias": jnp.asarray(found[f"{name}.base_layer.bias"]) for name in "02"}
    plan = jlora.plan(params, jlora.LoraConfig(rank=3, targets=("^0$", "^2$")))
    rule = jlora.vera(jax.random.key(0), plan)
    assert (rule.a.shape, rule.b.shape) == (found["a"].T.shape, found["b"].T.shape)
    rule = dataclasses.replace(rule, a=jnp.asarray(found["a"].T), b=jnp.asarray(found["b"].T))
    names = {f"{i}/{ours}": f"{i}.vera_lambda_{theirs}.default" for i in "02" for ours, theirs in ("ud", "vb")}
    trained = {ours: jnp.asarray(found[theirs]) for ours, theirs in names.items()}

    def loss(trained: Any) -> Any:
        y = jlora.lora(mlp, materialize="error")(jlora.attach(params, rule.adapters(trained)), found["x"])
        return jnp.sin(y).sum(), y

    (_, y), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    assert_close(y, found["y"])
    assert_close(grads, {ours: found[f"gradient of {theirs}"] for ours, theirs in names.items()})


def test_vera_equals_what_peft_computed() -> None:
    assert_equals(load_file(FILE))


@needs_peft
def test_vera_equals_what_peft_computes_today() -> None:
    with quiet():
        found = computed()
    assert_equals(found)
    golden = load_file(FILE)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in golden.items()}


def test_fresh_matrices_have_the_distribution_of_pefts() -> None:
    """kaiming_uniform: A's bound is sqrt(6 / inputs), B's sqrt(6 / rank)."""
    params = {"w": jnp.zeros((64, 96))}
    rule = jlora.vera(jax.random.key(0), jlora.plan(params, jlora.LoraConfig(rank=32, targets=("w",))))
    for matrix, fan_in in ((rule.a, 64), (rule.b, 32)):
        bound = (6 / fan_in) ** 0.5
        assert 0.98 * bound < jnp.abs(matrix).max() <= bound
        np.testing.assert_allclose(matrix.std(), bound / 3**0.5, rtol=0.05)


@pytest.mark.parametrize("rule", [jlora.vera, jlora.tied_lora])
def test_expanded_updates_load_in_peft_as_plain_lora(rule: Any, tmp_path: Path) -> None:
    """The expanded form is a plain adapter in peft's files."""
    model, params = network()
    ids = jnp.arange(12).reshape(2, 6)
    config = jlora.LoraConfig(rank=2, alpha=4)
    made = rule(jax.random.key(1), jlora.plan(params, config, jlora.trace(model.apply, params, ids)))
    trained = {name: value + 0.1 for name, value in made.init(jax.random.key(2), params).items()}
    names = models.tensor_names(model)
    peft.save(tmp_path, names, params, made.adapters(trained), config)
    again, _ = peft.load(tmp_path, names)
    apply = jlora.lora(model.apply)
    got, want = (apply(jlora.attach(params, adapters), ids) for adapters in (again, made.adapters(trained)))
    assert_close(got, want)

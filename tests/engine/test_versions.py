"""`lora` of one function is one function, for as long as it is in use."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import jax
import pytest

import jlora
from tests.toys import MLP, adapters_for

TREE = jlora.attach(MLP.params, adapters_for(MLP.fn, MLP.params, MLP.x))


class Model:
    """A model that cannot be hashed."""

    def __init__(self) -> None:
        self.traced = 0

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __call__(self, params: Any, x: Any) -> Any:
        self.traced += 1
        return MLP.fn(params, x)

    def apply(self, params: Any, x: Any) -> Any:
        return self(params, x)

    def other(self, params: Any, x: Any) -> Any:
        return self(params, x)


def test_one_function_and_one_policy_have_one_version() -> None:
    """Functions and callable objects by identity, methods by their object; other options make another version."""
    model = Model()
    for get in (lambda: MLP.fn, lambda: model, lambda: model.apply):
        version = jlora.lora(get())
        assert version is jlora.lora(get()) is jlora.lora(get(), materialize="warn")
        options: Any = ({"materialize": "error"}, {"inline_custom_rules": True}, {"frozen_gradients": True})
        for option in options:
            assert jlora.lora(get(), **option) is not version
    versions = [jlora.lora(f) for f in (model, model.apply, model.other, Model().apply, functools.partial(MLP.fn))]
    assert len(set(map(id, versions))) == len(versions)


def test_a_second_use_compiles_nothing() -> None:
    """A jitted version is found again through the function alone; a new one would be traced."""
    model = Model()
    step = jax.jit(jlora.lora(model.apply))
    step(TREE, MLP.x)
    assert model.traced == 1
    jax.jit(jlora.lora(model.apply))(TREE, MLP.x)
    assert model.traced == 1

    @functools.partial(jax.jit, static_argnums=0)
    def run(apply: Any, tree: Any, x: Any) -> Any:
        return apply(tree, x)

    run(jlora.lora(model), TREE, MLP.x)  # kept by the cache of `run` alone
    run(jlora.lora(model), TREE, MLP.x)
    assert model.traced == 2


@pytest.mark.parametrize("method", [False, True])
def test_a_version_keeps_nothing_alive(method: bool) -> None:
    """Model and version go when their last user does."""
    model = Model()
    version = jlora.lora(model.apply if method else model)
    jax.jit(version)(TREE, MLP.x)
    seen = [weakref.ref(model), weakref.ref(version)]
    del model
    version(TREE, MLP.x)  # it keeps its function alive
    del version
    gc.collect()
    assert [ref() for ref in seen] == [None, None]

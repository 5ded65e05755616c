"""Update rules: trained values of other kinds, expanded to adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.engine.test_laws import Case, cases, close
from tests.toys import TOYS, adapted_loss, assert_close, merged_loss, normal

RULES: dict[str, Any] = {
    "vera": jlora.vera,
    "tied": jlora.tied_lora,
    "tied, frozen": lambda key, plan: jlora.tied_lora(key, plan, train_shared=False),
}
KEY = jax.random.key(0)
every_rule = pytest.mark.parametrize("name", RULES)


def made(name: str, toy: str = "stacked", **config: Any) -> tuple[Any, dict[str, jax.Array]]:
    """A rule for a toy, and trained values that are all felt."""
    fn, params, x = TOYS[toy]
    uses = jlora.trace(fn, params, x)
    targets = tuple(f"^{path}$" for path, use in uses.items() if use.kind in ("matmul", "lookup"))
    options = {"rank": 3, "alpha": 6, "targets": targets} | config
    rule = RULES[name](KEY, jlora.plan(params, jlora.LoraConfig(**options), uses))
    return rule, felt(rule.init(jax.random.key(1), params))


def felt(trained: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: value + normal(i, *value.shape) for i, (name, value) in enumerate(sorted(trained.items()))}


@pytest.mark.sampled(3)
@every_rule
@pytest.mark.parametrize("use_dora", [False, True])
@hypothesis.settings(max_examples=8)
@hypothesis.given(case=cases, data=st.data())
def test_every_law_holds(name: str, use_dora: bool, case: Case, data: Any) -> None:
    """For drawn uses of a weight: fresh values change nothing; loss and gradient of the trained values equal those
    through the merged weights; unmerge inverts merge."""
    key = jax.random.key(math.prod(case.w) + math.prod(case.x))
    params, x = {"w": jax.random.normal(key, case.w) / 2}, jax.random.normal(key, case.x)
    fn = lambda params, x: case.use(params["w"], x)  # noqa: E731
    config = jlora.LoraConfig(rank=2, alpha=3, targets=("w",), exclude=(), use_dora=use_dora)
    rule = RULES[name](KEY, jlora.plan(params, config, jlora.trace(fn, params, x)))
    fresh = rule.init(KEY, params)
    policy = "allow" if use_dora else "error"

    @jax.jit
    def everything(rule: Any, trained: Any) -> Any:
        apply = jlora.lora(fn, materialize=policy)
        unchanged = fn(params, x), apply(jlora.attach(params, rule.adapters(fresh)), x)
        losses = [adapted_loss(fn, policy), merged_loss(fn)]
        found = [jax.value_and_grad(lambda t, f=f: f(rule.adapters(t), params, x))(trained) for f in losses]
        adapters = rule.adapters(trained)
        back = params if use_dora else jlora.unmerge(jlora.merge(params, adapters), adapters)
        return unchanged, found, (params, back)

    for got, want in everything(rule, felt(fresh)):
        close(got, want, "float32")


@every_rule
@pytest.mark.parametrize("toy", TOYS)
def test_the_update_is_the_one_written_out(name: str, toy: str) -> None:
    """Stacked, of experts, looked up: A · diag(u) · B · diag(v), with the first rows and columns of what is shared."""
    rule, trained = made(name, toy)
    for path, f in rule.adapters(trained).items():
        shape = TOYS[toy].params[path].shape
        (inputs,), outputs = f.axes.sizes(shape)[1], math.prod(f.axes.sizes(shape)[2])
        if name == "vera":
            a, b, scale = rule.a[:inputs], rule.b[:, :outputs], 1.0
        else:
            shared = trained if name == "tied" else rule.shared
            a, b = (shared[f"shared/{inputs}x3x{outputs}/{part}"] for part in "ab")
            scale = 2.0
        u, v = trained[f"{path}/u"], trained[f"{path}/v"]
        if f.axes.outputs == (0, 2):  # experts that share their input
            want = scale * jnp.einsum("ir,r,reo,eo->eio", a, u, b.reshape(-1, *v.shape), v)
        else:
            want = scale * jnp.einsum("ir,...r,ro,...o->...io", a, u, b, v)
        zero = {path: jnp.zeros(shape)}
        assert_close(jlora.merge(zero, {path: f})[path], want)


@every_rule
def test_only_what_a_rule_names_is_trained_and_stored(name: str, tmp_path: Path) -> None:
    """A step changes no frozen matrix; values on disk, and the key of the rule, are enough to restore the model."""
    fn, params, x = TOYS["stacked"]
    rule, trained = made(name)
    sizes = {key.rpartition("/")[2]: value.size for key, value in trained.items()}
    assert ("a" in sizes) == (name == "tied")
    tx = optax.adamw(0.1)

    @jax.jit
    def step(rule: Any, trained: Any, state: Any) -> Any:
        grads = jax.grad(lambda t: adapted_loss(fn)(rule.adapters(t), params, x))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    after, _ = step(rule, trained, tx.init(trained))
    assert all(not np.array_equal(after[key], trained[key]) for key in trained)
    jlora.save(tmp_path / "trained", after)
    again, _ = made(name)
    assert_close(again.adapters(jlora.load(tmp_path / "trained")), rule.adapters(after), 0)
    jlora.save(tmp_path / "plain", rule.adapters(after))
    plain = jlora.load(tmp_path / "plain")
    got = jlora.lora(fn, materialize="error")(jlora.attach(params, plain), x)
    assert_close(got, fn(jlora.merge(params, rule.adapters(after)), x))


def test_a_frozen_matrix_gets_no_gradient() -> None:
    """One product fewer in the backward pass for every weight whose A is frozen."""
    fn, params, x = TOYS["mlp"]

    def products(name: str) -> int:
        rule, trained = made(name, "mlp")
        grad = jax.grad(lambda t, rule: adapted_loss(fn)(rule.adapters(t), params, x))
        equations = jaxpr_equations(jax.make_jaxpr(grad)(trained, rule).jaxpr)
        return sum(eqn.primitive.name == "contract" for eqn in equations)

    assert products("tied") - products("tied, frozen") == 2
    assert products("vera") == products("tied, frozen")


def jaxpr_equations(jaxpr: Any) -> list[Any]:
    inner = [v for eqn in jaxpr.eqns for v in eqn.params.values() if hasattr(getattr(v, "jaxpr", v), "eqns")]
    return [*jaxpr.eqns, *(e for v in inner for e in jaxpr_equations(getattr(v, "jaxpr", v)))]


@every_rule
def test_leaves_trained_whole_dropout_and_magnitudes_pass_through(name: str) -> None:
    rule, trained = made(name, "mlp", targets=("w0",), train_also=("bias",), use_dora=True, dropout=0.5)
    adapters = rule.adapters(trained)
    assert adapters["bias"] is trained["bias"]
    assert adapters["w0"].magnitude is trained["w0/magnitude"]
    assert adapters["w0"].dropout == 0.5
    assert isinstance(rule, jlora.UpdateRule)


def test_a_rule_is_a_pytree_of_what_is_frozen() -> None:
    """So a compiled step takes it as an argument; its matrices are no constants of the program."""
    rule, trained = made("vera")
    assert [x.shape for x in jax.tree.leaves(rule)] == [(16, 3), (3, 16)]
    text = jax.jit(lambda rule, t: rule.adapters(t)).lower(rule, trained).as_text()
    assert 'dense<"' not in text
    assert len(jax.tree.leaves(made("tied, frozen")[0])) == 4


def test_errors_of_rules() -> None:
    _, params, _ = TOYS["mlp"]
    config = jlora.LoraConfig(rank=2, targets=("w0", "w1"), overrides=(jlora.Override("w1", rank=3),))
    with pytest.raises(ValueError, match=r"vera: .*one rank; got \[2, 3\]"):
        jlora.vera(KEY, jlora.plan(params, config))
    jlora.tied_lora(KEY, jlora.plan(params, config))
    whole = jlora.plan(params, jlora.LoraConfig(targets=(), train_also=("bias",)))
    with pytest.raises(ValueError, match="no weights with factors"):
        jlora.vera(KEY, whole)

"""Laws of `jlora.optim`: each optimizer on adapters and attached trees, its invariances, and peft's own steps."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import optim
from tests.toys import TOYS, assert_close, loss_of, normal

KEY = jax.random.key(0)
OPTIMIZERS: dict[str, Any] = {
    "loraplus": lambda tx: optim.loraplus(tx, 4.0),
    "lora_fa": optim.lora_fa,
    "riemannian": optim.riemannian,
    "loraplus of riemannian": lambda tx: optim.loraplus(optim.riemannian(tx), 2.0),
    "lora_fa of loraplus": lambda tx: optim.lora_fa(optim.loraplus(tx, 2.0)),
}


def started(toy: str, **fields: Any) -> tuple[Any, Any, Any, Any]:
    """A model, its params and input, and adapters that have moved off zero."""
    fn, params, x = TOYS[toy]
    config = jlora.LoraConfig(rank=2, alpha=3.0, train_also=("bias",) if toy == "mlp" else (), **fields)
    adapters: Any = jlora.init(KEY, params, config, jlora.trace(fn, params, x))
    return fn, params, x, jax.tree.map(lambda a: a + normal(7, *a.shape), adapters)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("toy", ["mlp", "stacked", "experts"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adapters_and_attached_trees_move_alike(name: str, toy: str) -> None:
    """Under jit, with and without `freeze`, with DoRA and leaves trained whole; frozen leaves stay."""
    fn, params, x, adapters = started(toy, use_dora=True)
    tx = OPTIMIZERS[name](optax.adamw(1e-2, mask=optim.decay_mask))
    whole, apply = jlora.freeze(tx), jlora.lora(fn, materialize="allow")
    tree = jlora.attach(params, adapters)
    loss = lambda tree: loss_of(apply(tree, x))  # noqa: E731

    @jax.jit
    def both(adapters: Any, tree: Any) -> Any:
        state, whole_state = tx.init(adapters), whole.init(tree)
        for _ in range(2):
            moved, state = tx.update(jax.grad(lambda a: loss(jlora.attach(params, a)))(adapters), state, adapters)
            adapters = optax.apply_updates(adapters, moved)
            moved, whole_state = whole.update(jax.grad(loss)(tree), whole_state, tree)
            tree = optax.apply_updates(tree, moved)
        return adapters, tree

    alone, together = both(adapters, tree)
    kept, found = jlora.detach(together)
    assert_close(found, alone)
    chex.assert_trees_all_equal(kept, params)
    still = [np.array_equal(f.a, adapters[p].a) for p, f in alone.items() if isinstance(f, jlora.LoraFactors)]
    assert all(still) if name.startswith("lora_fa") else not any(still)
    assert not any(np.array_equal(f.b, adapters[p].b) for p, f in alone.items() if isinstance(f, jlora.LoraFactors))


def test_loraplus_is_a_learning_rate_for_b() -> None:
    """As with an optimizer for each label, decay included."""
    *_, adapters = started("mlp")
    tx = optim.loraplus(optax.adamw(1e-3, weight_decay=0.1), 16.0)
    rates = {"A": 1e-3, "B": 16e-3, "full": 1e-3}
    two: Any = optax.partition({name: optax.adamw(r, weight_decay=0.1) for name, r in rates.items()}, jlora.labels)
    grads = jax.tree.map(jnp.sin, adapters)
    assert_close(tx.update(grads, tx.init(adapters), adapters)[0], two.update(grads, two.init(adapters), adapters)[0])


def test_lora_fa_steps_along_the_projected_gradient() -> None:
    """With SGD, the change of the weight is -rate · P·G: the gradient of the weight on the columns of A, per slice."""
    fn, params, x, adapters = started("stacked")
    tx = optim.lora_fa(optax.sgd(1.0))
    apply = jlora.lora(fn)
    grads = jax.grad(lambda a: loss_of(apply(jlora.attach(params, optim.frozen_a(a)), x)))(adapters)
    moved: Any = tx.update(grads, tx.init(adapters), adapters)[0]
    merged = jlora.merge(params, adapters)
    full = jax.grad(lambda p: loss_of(fn(p, x)))(merged)
    after: Any = optax.apply_updates(adapters, moved)
    change = jax.tree.map(jnp.subtract, jlora.merge(params, after), merged)
    for path, f in adapters.items():
        basis = jnp.linalg.qr(f.a)[0]
        np.testing.assert_allclose(change[path], -basis @ (basis.mT @ full[path]), rtol=1e-3, atol=2e-4)


def test_lora_fa_keeps_no_inputs_and_no_state_for_a() -> None:
    """With `frozen_a`, the backward pass keeps one activation less for each adapted weight, its input; so the compiled
    gradient needs less memory."""
    width, tokens, rank = 64, 512, 4
    params = {f"w{i}": normal(i, width, width) for i in range(4)}

    def fn(params: Any, x: Any) -> Any:
        for i in range(4):
            x = jax.nn.relu(x @ params[f"w{i}"])  # its derivative needs a boolean for each entry
        return x

    config = jlora.LoraConfig(rank=rank)
    x = jnp.ones((tokens, width))
    adapters: Any = jlora.init(KEY, params, config, jlora.trace(fn, params, x))
    apply = jlora.lora(fn)

    def kept(frozen: Any) -> int:
        loss = lambda a: jnp.sum(apply(jlora.attach(params, frozen(a)), x))  # noqa: E731
        residuals = jax.tree.leaves(jax.vjp(loss, adapters)[1])
        return sum(r.size for r in residuals if r.dtype == jnp.float32 and r.shape == (tokens, width))

    def temporary(frozen: Any) -> int:
        gradient = jax.grad(lambda a, x: jnp.sum(apply(jlora.attach(params, frozen(a)), x)))
        analysis: Any = jax.jit(gradient).lower(adapters, x).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert kept(lambda a: a) - kept(optim.frozen_a) == 4 * tokens * width
    assert temporary(optim.frozen_a) < 0.75 * temporary(lambda a: a)
    state = optim.lora_fa(optax.adam(1e-3)).init(adapters)
    assert sum(s.size for s in jax.tree.leaves(state)) == 2 * sum(f.b.size for f in adapters.values()) + 1


def test_lora_fa_names_tables_that_would_never_change() -> None:
    fn, params, ids = TOYS["tied"]
    config = jlora.LoraConfig(rank=2, targets=("table",))
    adapters: Any = jlora.init(KEY, params, config, jlora.trace(fn, params, ids))
    for tree in (adapters, jlora.attach(params, adapters)):
        with pytest.raises(ValueError, match="table"):
            optim.lora_fa(optax.sgd(1.0)).init(tree)


def test_riemannian_steps_do_not_see_how_the_update_is_divided() -> None:
    """A times p and B divided by it: the same change of the weight, to first order, with SGD and a small reg."""
    fn, params, x, adapters = started("experts")
    tx = optim.riemannian(optax.sgd(1e-4), reg=1e-9)

    def change(adapters: Any) -> Any:
        grads = jax.grad(lambda a: loss_of(jlora.lora(fn)(jlora.attach(params, a), x)))(adapters)
        moved: Any = optax.apply_updates(adapters, tx.update(grads, tx.init(adapters), adapters)[0])
        return jax.tree.map(jnp.subtract, jlora.merge(params, moved), jlora.merge(params, adapters))

    other: Any = {path: dataclasses.replace(f, a=8 * f.a, b=f.b / 8) for path, f in adapters.items()}
    for ours, theirs in zip(*map(jax.tree.leaves, (change(adapters), change(other))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.02 * float(jnp.abs(ours).max()))


def test_decay_spares_magnitudes_norms_and_biases() -> None:
    """Also norms of stacked layers, which are matrices; in adapters, attached trees and plain parameters."""
    params = {
        "layers": {"norm": {"scale": jnp.ones((2, 8))}, "up": {"kernel": normal(0, 2, 8, 4), "bias": jnp.ones((2, 4))}},
        "ln_f": jnp.ones((1, 8)),
        "head": {"kernel": normal(1, 8, 3), "bias": jnp.ones(3)},
    }
    config = jlora.LoraConfig(
        rank=2, targets=("up/kernel",), exclude=(), train_also=("norm", "bias", "ln_f", "head"), use_dora=True
    )
    uses = jlora.trace(lambda p, x: jnp.einsum("bi,lio->lbo", x, p["layers"]["up"]["kernel"]), params, jnp.ones((2, 8)))
    adapters: Any = jlora.init(KEY, params, config, uses)
    mask: Any = optim.decay_mask(adapters)
    f = mask["layers/up/kernel"]
    assert (f.a, f.b, f.magnitude) == (True, True, False)
    assert {p for p, keep in mask.items() if keep is True} == {"head/kernel"}
    whole: Any = optim.decay_mask(jlora.attach(params, adapters))
    assert jax.tree.structure(whole) == jax.tree.structure(jlora.attach(params, adapters))
    assert sum(jax.tree.leaves(whole)) == sum(jax.tree.leaves(mask)) == 3
    plain: Any = optim.decay_mask(params)
    assert plain["head"] == {"kernel": True, "bias": False} and plain["layers"]["up"] == {"kernel": True, "bias": False}
    tx = optax.adamw(1e-2, weight_decay=0.5, mask=optim.decay_mask)
    moved: Any = tx.update(jax.tree.map(jnp.zeros_like, adapters), tx.init(adapters), adapters)[0]
    assert not moved["layers/up/kernel"].magnitude.any() and moved["head/kernel"].any() and not moved["ln_f"].any()


@pytest.mark.parametrize("name", ["loraplus", "lora_fa", "riemannian"])
def test_pefts_optimizers_take_the_same_steps(name: str) -> None:
    """Three steps of peft's optimizer from the same factors and batches; its LoRA-FA computes in bfloat16."""
    torch = pytest.importorskip("torch")
    peft, optimizers = pytest.importorskip("peft"), pytest.importorskip("peft.optimizers")
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False))
    model = peft.get_peft_model(linear, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B.default.weight)
    x, y = normal(0, 32, 12), normal(1, 32, 10)
    params = {"w": jnp.asarray(layer.weight.detach().numpy().T)}
    numbers = [jnp.asarray(m.default.weight.detach().numpy().T.copy()) for m in (layer.lora_A, layer.lora_B)]
    adapters: Any = {"w": jlora.LoraFactors(*numbers, scale=5 / 3)}
    if name == "loraplus":
        tx = optim.loraplus(optax.adamw(1e-3, eps=1e-8, weight_decay=0.01), 8.0)
        theirs = optimizers.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.01
        )
    elif name == "lora_fa":
        tx = optim.lora_fa(optax.adamw(1e-2, eps=1e-6, weight_decay=0.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = optimizers.create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=1e-2)
    else:
        tx = optim.riemannian(optax.sgd(1e-2))
        theirs = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
    state, apply = tx.init(adapters), jlora.lora(lambda p, x: x @ p["w"])
    for _ in range(3):
        grads = jax.grad(lambda a: jnp.mean((apply(jlora.attach(params, a), x) - y) ** 2))(adapters)
        moved, state = tx.update(grads, state, adapters)
        adapters = cast(Any, optax.apply_updates(adapters, moved))
        theirs.zero_grad()
        out = model(torch.tensor(np.asarray(x)))
        ((out - torch.tensor(np.asarray(y))) ** 2).mean().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.step()
    tolerance = 2e-3 if name == "lora_fa" else 1e-5
    for ours, module in zip((adapters["w"].a, adapters["w"].b), (layer.lora_A, layer.lora_B), strict=True):
        np.testing.assert_allclose(np.asarray(ours).T, module.default.weight.detach().numpy(), atol=tolerance)

"""Optimizers for adapters: each wraps one of optax, and takes adapters as well as attached trees (under
`jlora.freeze`).

- `loraplus`: a larger learning rate for B.
- `lora_fa`: A stays as it is; with `frozen_a` in the loss, its inputs are not kept for the backward pass.
- `riemannian`: gradients preconditioned by the other factor.
- `decay_mask`: weight decay that spares magnitudes, norms and biases.

>>> from jlora import optim
>>> tx = optim.loraplus(optax.adamw(1e-4, mask=optim.decay_mask), ratio=16)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jlora._src.tree.labels import labels
from jlora._src.types import Adapters, Array, LoraFactors, Path, PyTree
from jlora.messages import bullets

__all__ = ["decay_mask", "frozen_a", "lora_fa", "loraplus", "riemannian"]

_SPARED = re.compile(r"(^|/)([^/]*norm[^/]*|ln_?\d*\w?|bias|b|scale|gamma|beta|offset)(/|$)", re.IGNORECASE)
"""Paths of norms and biases, by their usual names, also where layers are stacked."""


def loraplus(tx: optax.GradientTransformation, ratio: float = 16.0) -> optax.GradientTransformationExtraArgs:
    """``tx`` with ``ratio`` times its learning rate for B (LoRA+, Hayou et al. 2024, https://arxiv.org/abs/2402.12354).

    B's updates are multiplied by ``ratio``, weight decay included, as under a learning rate that much larger: the same
    for every optimizer whose updates are proportional to its learning rate. ``tx`` still sees all gradients at once, so
    that a clipped global norm is that of all of them.

    >>> tx = optim.loraplus(optax.adamw(1e-4), ratio=16)
    """
    return optax.with_extra_args_support(optax.chain(tx, optax.masked(optax.scale(ratio), _is_b)))


def lora_fa(tx: optax.GradientTransformation, *, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """``tx`` for everything but A, which stays as it was initialized (LoRA-FA, Zhang et al. 2023,
    https://arxiv.org/abs/2308.03303), with B's gradient replaced by ``(AᵀA + eps·I)⁻¹ · dB / scale²``.

    With this gradient the update of the weight is as near to that of full training as A allows (as in PEFT's
    ``create_lorafa_optimizer``, but always in float32). ``tx`` keeps no state for A. The saving of activations is in
    the loss: with `frozen_a`, the inputs of the adapted weights are not kept for the backward pass, only their
    products with A.

    >>> tx = optim.lora_fa(optax.adamw(1e-3))
    >>> loss = lambda adapters: loss_fn(apply(jlora.attach(params, optim.frozen_a(adapters)), batch))

    Raises:
      ValueError: in ``init``, listing adapters whose A is all zero, as those of lookup tables, which would never
        change. Not checked under ``jit``.
    """

    def precondition(g: LoraFactors, f: LoraFactors) -> LoraFactors:
        damped = _gram(f.a, f.axes.batch, eps)
        return dataclasses.replace(g, b=_solved(damped, g.b, f.axes.batch) / f.scale**2)

    def groups(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda label: "frozen" if label in ("A", "frozen") else "trained", labels(tree))

    def check(params: PyTree) -> None:
        zero = [path for path, f in _factors(params).items() if not isinstance(f.a, Tracer) and not bool(jnp.any(f.a))]
        if zero:
            raise ValueError(
                f"lora_fa: A is zero and stays so, so these adapters would never change:{bullets(map(repr, zero))}\n"
                "Expected adapters with a random A: exclude lookup tables from the targets, or use another optimizer."
            )

    return _preconditioned(optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, groups), precondition, check)


def frozen_a(adapters: Adapters) -> dict[Path, LoraFactors | Array]:
    """The adapters with no gradient of A, for a loss under `lora_fa`.

    >>> logits = apply(jlora.attach(params, optim.frozen_a(adapters)), batch)
    """
    return {
        path: dataclasses.replace(v, a=jax.lax.stop_gradient(v.a)) if isinstance(v, LoraFactors) else v
        for path, v in adapters.items()
    }


def riemannian(tx: optax.GradientTransformation, *, reg: float = 1e-2) -> optax.GradientTransformationExtraArgs:
    """``tx`` on gradients that are preconditioned by the other factor: ``dA · (BBᵀ + reg·I)⁻¹`` and
    ``(AᵀA + reg·I)⁻¹ · dB`` (Zhang and Pilanci 2024, https://arxiv.org/abs/2402.02347, with ``reg`` as in PEFT's
    ``create_riemannian_optimizer``).

    The update of the weight then depends on the product of the factors, and not on how it is divided between them, up
    to ``reg``. The rank-sized solves run in float32, for each slice of a stacked weight.

    >>> tx = optim.riemannian(optax.adamw(1e-3))
    """

    def precondition(g: LoraFactors, f: LoraFactors) -> LoraFactors:
        batch = f.axes.batch
        flipped = _solved(_gram(f.b, batch, reg, rank_first=True), jnp.moveaxis(g.a, -1, len(batch)), batch)
        b = _solved(_gram(f.a, batch, reg), g.b, batch)
        return dataclasses.replace(g, a=jnp.moveaxis(flipped, len(batch), -1), b=b)

    return _preconditioned(tx, precondition)


def decay_mask(tree: PyTree) -> PyTree:
    """A tree of the same structure: True for what weight decay should shrink: A, B and matrices trained whole; False
    for magnitudes, vectors, norms and biases (by the usual names in their paths), and for frozen leaves.

    >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=optim.decay_mask)

    Args:
      tree: adapters, an attached tree, or any tree of parameters, in which every leaf counts as trained whole.
    """
    try:
        names = labels(tree)
    except ValueError:  # nothing but leaves trained whole
        names = jax.tree.map(lambda _: "full", tree)

    def decays(path: Path, leaf: Any, label: str) -> bool:
        return label in ("A", "B") or (label == "full" and jnp.ndim(leaf) > 1 and not _SPARED.search(path))

    return _mask(tree, names, decays)


def _mask(tree: PyTree, names: PyTree, keep: Callable[[Path, Any, str], bool]) -> PyTree:
    """``keep(path, leaf, label)`` of every leaf. The tree may lack some of the labels' leaves, as one that
    `optax.partition` masked."""
    by_path = {keys: label for keys, label in jax.tree_util.tree_flatten_with_path(names)[0]}
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: keep(_path(keys), leaf, by_path[keys]), tree)


def _path(keys: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def _is_b(tree: PyTree) -> PyTree:
    return _mask(tree, labels(tree), lambda path, leaf, label: label == "B")


def _is_factors(x: Any) -> bool:
    return isinstance(x, LoraFactors)


def _factors(tree: PyTree) -> dict[Path, LoraFactors]:
    """The factors of adapters, or of an attached tree, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_factors)
    return {_path(keys): leaf for keys, leaf in leaves if _is_factors(leaf)}


def _preconditioned(
    tx: optax.GradientTransformation,
    precondition: Callable[[LoraFactors, LoraFactors], LoraFactors],
    check: Callable[[PyTree], None] = lambda params: None,
) -> optax.GradientTransformationExtraArgs:
    """``tx`` after ``precondition(gradients, factors)`` of every adapter."""
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Any:
        check(params)
        return inner.init(params)

    def one(g: Any, f: Any) -> Any:
        return precondition(g, f) if _is_factors(f) else g

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("update: got no params; expected tx.update(gradients, state, adapters)")
        with jax.default_matmul_precision("highest"):
            updates = jax.tree.map(one, updates, params, is_leaf=_is_factors)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _gram(factor: Array, batch: tuple[int, ...], damping: float, rank_first: bool = False) -> Array:
    """``FᵀF + damping·I`` of a factor with its rank last, or ``FFᵀ + damping·I`` with it first; ``[*batch, r, r]``."""
    n = len(batch)
    flat = factor.astype(jnp.float32) if rank_first else jnp.moveaxis(factor, -1, n).astype(jnp.float32)
    rows = flat.reshape(*flat.shape[: n + 1], -1)
    return rows @ rows.mT + damping * jnp.eye(rows.shape[-2])


def _solved(gram: Array, gradient: Array, batch: tuple[int, ...]) -> Array:
    """``gram⁻¹ · gradient`` over the rank, the axis after the batch, in the gradient's dtype."""
    n = len(batch)
    rows = gradient.astype(jnp.float32).reshape(*gradient.shape[: n + 1], -1)
    solved = jnp.linalg.pinv(gram, hermitian=True) @ rows  # exists also where the rank exceeds the inputs
    return solved.reshape(gradient.shape).astype(gradient.dtype)

"""`lora`: runs a function on trees that carry adapters. `explain`: how it handles each weight."""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

from jlora._src.engine.dependence import constant_gathers, forwarded_inputs, live_inputs, trained_operands
from jlora._src.engine.factors.factored import Factored, frozen, materialize, to_factored
from jlora._src.engine.interpreter import Event, Policy, Session
from jlora._src.engine.observation import Mode
from jlora._src.engine.rows import per_row
from jlora._src.engine.staging import Staged, check_callable, is_array, replace_leaves, stage
from jlora._src.quantized import QuantizedArray, is_one_leaf
from jlora._src.types import FullWeight, LoraFactors, LoraWeight, PyTree, RowWeight, is_attached
from jlora.messages import bullets, table

F = TypeVar("F", bound=Callable[..., Any])

_MUTATES = (
    "lora: the function mutates its arguments and does not return what it changed. It is traced on copies of them, so "
    "these changes would be lost:"
)
_RETURN_IT = (
    "\nReturn the changed object, and use it from then on: `y, tree = jlora.lora(lambda m, x: (m(x), m))(tree, x)`; or "
    "split a Flax NNX module: `nnx.split` it, `nnx.merge` it in the function, and return its new state. To discard a "
    "change, make it on a copy in the function: `dict(batch)`, or `nnx.clone(m)`."
)


_NOT_ATTACHED = (
    "jlora.lora: an argument holds adapters, and no argument is an attached tree. Expected "
    "`apply(jlora.attach(params, adapters), ...)`."
)


def lora(
    fn: F, *, materialize: Policy = "warn", inline_custom_rules: bool = False, frozen_gradients: bool = False
) -> F:
    """A version of ``fn`` that accepts attached trees, with the same signature.

    ``fn`` is traced on the plain weights and its jaxpr evaluated with the adapted ones kept factored:
    ``x @ (W + s·a·b)`` becomes ``x @ W + s·(x @ a) @ b``. The full update is never built, and when the gradient is
    taken with respect to the adapters, neither is the gradient of ``W``. ``fn`` itself is not changed.

    Composes with ``jit``, ``grad``, ``jvp``, ``vmap``, ``jax.checkpoint``, ``scan``, ``cond``, ``while``, ``shard_map``
    and ``pmap``, outside or inside ``fn``. Put it under ``jax.jit``: like every transform, it traces ``fn``
    again at each call. With the same options, the version of one function is one object as long as it is in use, so
    that what was compiled for it is found again; methods of one object count as one function.

    ``fn`` gets copies of its arguments. If it mutates one (the statistics of a Flax NNX BatchNorm, a dropout counter,
    a dict, a list), it must return that object, or the new array:

    >>> y, tree = jlora.lora(lambda module, x: (module(x), module))(tree, x)

    >>> apply = jlora.lora(model.apply)
    >>> loss = lambda adapters: loss_fn(apply(jlora.attach(params, adapters), batch))
    >>> grads = jax.grad(loss)(adapters)

    Differentiate with respect to the adapters, as here. The gradient with respect to a whole attached tree is zero
    outside the adapters: for the weights under them, and for every other leaf of the same argument. In forward
    mode, the tangents of these leaves likewise count as zero. The other arguments, such as the inputs, and a run-time
    strength have their true derivatives. A zero gradient is not a zero update: weight decay still changes frozen
    weights, unless the optimizer is wrapped in `freeze`.

    Args:
      fn: a function of pytrees. Arrays and keys among its arguments are traced, everything else (flags, strings,
        functions, Python numbers) is static; its result may hold non-arrays too.
      materialize: what to do when a primitive has no factored form and the weight must be summed to its full
        size: ``"warn"`` once per weight, listing every place, ``"error"``, or ``"allow"``.
      inline_custom_rules: whether to inline ``jax.custom_jvp``, ``jax.custom_vjp`` and ``custom_vmap`` functions
        that take an adapted weight. By default they keep their rule and receive the materialized weight.
      frozen_gradients: whether frozen leaves have their true derivatives. Needed if the base itself is computed
        from trained values, or adapted by an outer `lora`.

    Raises:
      MaterializeError: under ``"error"``, naming path, primitive and source line.
      ValueError: if ``fn`` never reads an attached weight, usually because it closes over its parameters; or mutates
        its arguments and does not return what it changed, naming each place.
    """
    if materialize not in ("warn", "error", "allow"):
        raise ValueError(f'lora: materialize={materialize!r}; expected "warn", "error" or "allow"')

    check_callable(fn, "lora")

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return _call(Session(materialize, inline_custom_rules), fn, args, kwargs, frozen_gradients)

    # Every access to a method makes a new object.
    parts = (fn.__self__, fn.__func__) if isinstance(fn, types.MethodType) else (fn,)
    key = (*map(id, parts), materialize, inline_custom_rules, frozen_gradients)
    return _versions.setdefault(key, wrapped)


# By identity, because a function need not be hashable: an id is not given to another object while the version, which
# keeps its function alive, is there. A version is kept by its users alone.
_versions: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()


def observed_call(mode: Mode, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``fn`` without the updates of its adapted weights: the gradients of their factors A are moments of their inputs
    (`observation`)."""
    return _call(Session("allow", inline_custom_rules=False, observation=mode), fn, args, kwargs, False)


def _call(session: Session, fn: Callable[..., Any], args: Any, kwargs: Any, frozen_gradients: bool = True) -> Any:
    leaves = jax.tree.leaves((args, kwargs), is_leaf=is_one_leaf)
    if not any(map(is_one_leaf, leaves)):
        return _plain_call(fn, args, kwargs)
    if any(isinstance(leaf, RowWeight) for leaf in leaves):

        def one_group(*args: Any, **kwargs: Any) -> Any:
            return _call(session, fn, args, kwargs, frozen_gradients)

        return per_row(one_group)(*args, **kwargs)
    staged = stage(fn, args, kwargs)
    if staged.lost and session.policy != "explain":
        raise ValueError(_MUTATES + bullets(staged.lost) + _RETURN_IT)
    _check_read(staged)
    stop = (lambda x: x) if frozen_gradients else lax.stop_gradient

    def value(leaf: Any, array: Any, is_frozen: bool) -> Any:
        match leaf:
            case LoraWeight():
                return to_factored(dataclasses.replace(leaf, base=jax.tree.map(stop, leaf.base)))
            case QuantizedArray():
                return frozen(leaf, "")
            case FullWeight():
                return array
            case _:
                return stop(array) if is_frozen else array

    session.constant_gathers = constant_gathers(staged.jaxpr)
    session.trained_operands = trained_operands(staged.jaxpr, list(map(is_attached, staged.leaves)))
    args = list(map(value, staged.leaves, staged.arrays, staged.frozen))
    results = session.run(staged.jaxpr, staged.consts, args)

    def finish(forwarded: int | None, result: Any) -> Any:
        leaf = None if forwarded is None else staged.leaves[forwarded]
        if is_one_leaf(leaf):
            return leaf  # a weight that is returned unchanged stays attached, or quantized
        if isinstance(result, Factored) and (result.constant_rows or result.is_frozen):
            return materialize(result)  # looked-up rows, or a quantized weight
        if isinstance(result, Factored):
            why = "the function returns it changed, and the caller receives it merged"
            return session.materialize(result, "return", getattr(fn, "__qualname__", repr(fn)), why)
        return result

    rebuilt = staged.rebuild(map(finish, forwarded_inputs(staged.jaxpr), results))
    session.warn()
    return rebuilt


def _plain_call(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The function without adapters. An error gets a note if an argument holds adapters that are not attached."""
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        if any(isinstance(x, LoraFactors) for x in jax.tree.leaves((args, kwargs), is_leaf=_is_factors)):
            error.add_note(_NOT_ATTACHED)
        raise


def _is_factors(x: Any) -> bool:
    return isinstance(x, LoraFactors)


def _check_read(staged: Staged) -> None:
    """Raises a ValueError listing every attached weight that the function never reads."""
    read = zip(staged.leaves, live_inputs(staged.jaxpr), strict=True)
    unread = [leaf.path for leaf, live in read if is_attached(leaf) and not live]
    if unread:
        raise ValueError(
            f"lora: the function never reads {len(unread)} attached weight(s), so training them would have no "
            f"effect:{bullets(map(repr, unread))}\nOften the function closes over the parameters. "
            "Pass the attached tree where the function takes its parameters, or exclude these weights from the "
            "targets."
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a `lora` function handles each adapted weight; prints as a table.

    Attributes:
      events: every consumption, in program order.
    """

    events: tuple[Event, ...]

    @property
    def materialized(self) -> tuple[Event, ...]:
        """The consumptions for which the weight is summed to its full shape."""
        return tuple(e for e in self.events if e.why is not None)

    def __str__(self) -> str:
        grouped: dict[tuple[str, str, str], list[Event]] = defaultdict(list)
        for e in self.events:
            how = "factored" if e.why is None else f"materialized: {e.why}"
            grouped[e.path, e.primitive, how + (f" (base in {e.scheme})" if e.scheme else "")].append(e)
        rows = [
            (
                path,
                primitive,
                how,
                str(len(es)),
                f"{sum(e.flops for e in es):,}",
                es[0].source,
            )
            for (path, primitive, how), es in grouped.items()
        ]
        return table(("weight", "primitive", "how", "uses", "extra FLOPs", "where"), rows, right=(3, 4))


def explain(fn: Callable[..., Any], tree: PyTree, *args: Any, **kwargs: Any) -> Explanation:
    """How ``lora(fn)`` consumes each adapted weight of ``tree``: factored or materialized, why, at what cost.

    Abstract: nothing is computed, and ``tree`` and ``args`` may consist of `jax.ShapeDtypeStruct`. The extra FLOPs are
    the cost of the updates in one forward pass; a while loop counts as one iteration.

    >>> print(jlora.explain(model.apply, jlora.attach(params, adapters), batch))
    """
    check_callable(fn, "explain")
    session = Session("explain", inline_custom_rules=False)
    leaves, treedef = jax.tree.flatten((tree, args, kwargs))
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def run(*arrays: Any) -> None:
        inner_tree, inner_args, inner_kwargs = treedef.unflatten(replace_leaves(leaves, traced, arrays))
        _call(session, fn, (inner_tree, *inner_args), inner_kwargs)

    jax.eval_shape(run, *(leaves[i] for i in traced))
    return Explanation(tuple(session.events))

"""Every error says what it got, what it expected and how to fix it, and lists all offenders at once."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.messages import expect, message

PARAMS = {
    "layer_0": {"query": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}, "norm": {"scale": jnp.ones(4)}},
    "layer_1": {"query": {"kernel": jnp.ones((4, 2, 3))}},
    "head": {"kernel": jnp.ones((4, 2))},
    "ids": jnp.arange(3),
}
ONE = jlora.LoraConfig(rank=2, targets=("layer_0/query",))


def model(params: Any, x: Any, flag: bool = True) -> Any:
    heads = jnp.einsum("bi,ihd->bhd", x, params["layer_1"]["query"]["kernel"])
    y = x @ params["layer_0"]["query"]["kernel"] + params["layer_0"]["query"]["bias"]
    return (heads, y) if flag else y


def adapters() -> jlora.attach.__annotations__.get("adapters", Any):  # type: ignore[valid-type]
    return jlora.init(jax.random.key(0), PARAMS, ONE)


# ---- the config


def test_a_config_lists_every_field_that_is_out_of_range() -> None:
    text = message(
        ValueError,
        lambda: jlora.LoraConfig(
            rank=0,
            alpha=-1,
            dropout=1.0,
            targets="query",  # type: ignore[arg-type]
            exclude=("(",),
            dtype="int8",
            overrides=(jlora.Override("x", rank=-2),),
        ),
    )
    expect(
        text,
        "7 field(s)",
        "rank = 0; expected an integer above 0",
        "alpha = -1",
        "dropout = 1.0",
        "overrides[0].rank = -2",
    )
    expect(
        text,
        "targets = 'query'; expected 'all-linear' or a tuple of patterns: ('query',)",
        "'(' is not a regular",
        "int8",
    )


def test_a_misspelt_field_is_named_with_the_nearest() -> None:
    text = message(ValueError, lambda: jlora.LoraConfig.from_json('{"rnak": 4, "overrides": [{"patern": "x"}]}'))
    expect(
        text,
        "rnak (closest: 'rank')",
        "overrides[0].patern (closest: 'pattern')",
        "Expected among: rank",
    )


def test_the_policy_is_checked() -> None:
    expect(message(ValueError, lambda: jlora.lora(model, materialize="quiet")), "'quiet'", '"warn", "error" or "allow"')  # type: ignore[arg-type]


# ---- the plan


def test_patterns_that_match_nothing_are_listed_with_the_closest_paths() -> None:
    config = jlora.LoraConfig(
        targets=("layer_0/query", "qeury"),
        train_also=("haed",),
        exclude=("nothing",),
        overrides=(jlora.Override("kernle", rank=1),),
    )
    text = message(ValueError, lambda: jlora.plan(PARAMS, config))
    expect(
        text,
        "4 problem(s)",
        "target 'qeury' matches no weight (closest: 'layer_0/query/",
        "train_also 'haed'",
        "'head/kernel'",
    )
    expect(
        text,
        "exclude 'nothing' matches no weight",
        "override 'kernle' matches no adapted weight (closest: 'layer_0/query/kernel'",
    )


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("bias", "'layer_0/query/bias': shape (6,), dtype float32: not a floating matrix"),
        ("ids", "'ids': shape (3,), dtype int32: not a floating matrix"),
    ],
)
def test_a_target_that_is_not_a_floating_matrix_is_refused(pattern: str, why: str) -> None:
    expect(
        message(ValueError, lambda: jlora.plan(PARAMS, jlora.LoraConfig(targets=(pattern,)))),
        f"target '{pattern}'",
        why,
    )


def test_a_weight_of_many_axes_needs_uses() -> None:
    text = message(ValueError, lambda: jlora.plan(PARAMS, jlora.LoraConfig(targets=("query",))))
    expect(text, "'layer_1/query/kernel'", "(4, 2, 3)", "ambiguous", "uses=jlora.trace(fn, params, batch)")


def test_all_linear_needs_uses() -> None:
    expect(message(ValueError, lambda: jlora.plan(PARAMS, jlora.LoraConfig())), '"all-linear" needs uses=jlora.trace')


def test_weights_that_are_never_read_or_stopped_are_refused() -> None:
    def stopped(params: Any, x: Any) -> Any:
        return x @ jax.lax.stop_gradient(params["layer_0"]["query"]["kernel"])

    uses = jlora.trace(stopped, PARAMS, jnp.ones((1, 4)))
    assert uses["layer_0/query/kernel"].kind == "stopped"
    assert uses["head/kernel"].kind == "unread"
    config = jlora.LoraConfig(targets=("layer_0/query/kernel", "head"), exclude=())
    expect(
        message(ValueError, lambda: jlora.plan(PARAMS, config, uses)),
        "behind stop_gradient",
        "'head/kernel'",
        "never read",
    )


def test_uses_of_another_tree_are_refused() -> None:
    uses = jlora.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((1, 4)))
    expect(
        message(ValueError, lambda: jlora.plan(PARAMS, ONE, uses)),
        "uses come from another tree",
        "layer_0/query/kernel",
    )


def test_nothing_to_train_is_an_error_that_says_what_was_left_out() -> None:
    uses = jlora.trace(lambda p, x: x @ p["head"]["kernel"], PARAMS, jnp.ones((1, 4)))
    expect(
        message(ValueError, lambda: jlora.plan(PARAMS, jlora.LoraConfig(), uses)),
        "nothing is left to train",
        "head/kernel: excluded",
    )
    expect(message(ValueError, lambda: jlora.plan(PARAMS, jlora.LoraConfig(targets=()))), "nothing is left to train")


def test_a_plan_without_updates_is_a_warning_that_says_what_was_left_out() -> None:
    """As where the traced function closes over its parameters."""
    params = {"w": jnp.ones((4, 4)), "head": jnp.ones((4, 2))}
    config = jlora.LoraConfig(rank=2, train_also=("head",))
    uses = jlora.trace(lambda _, x: x @ params["w"] @ params["head"], params, jnp.ones((1, 4)))
    with pytest.warns(UserWarning, match=r"adapts no weight; only 1 leaves(.|\n)*w: never read(.|\n)*closes over"):
        jlora.plan(params, config, uses)
    jlora.plan(params, dataclasses.replace(config, targets=()), uses)


def test_train_also_must_be_floating() -> None:
    config = dataclasses.replace(ONE, train_also=("ids",))
    expect(
        message(ValueError, lambda: jlora.plan(PARAMS, config)),
        "'ids': dtype int32; train_also expects a floating leaf",
    )


def test_a_rank_above_the_matrix_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=re.escape("'layer_0/query/kernel': rank 5, min(fan_in, fan_out) = 4")):
        jlora.plan(PARAMS, dataclasses.replace(ONE, rank=5))


def test_two_leaves_of_one_path_are_refused() -> None:
    tree = {"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}
    expect(message(ValueError, lambda: jlora.plan(tree, ONE)), "more than one leaf: ['a/b']")


def test_ranks_and_keys_are_checked() -> None:
    wrong: list[Any] = [4.0, True, "8", float("nan")]
    for rank in wrong:
        expect(message(ValueError, lambda r=rank: jlora.LoraConfig(rank=r)), f"rank = {rank!r}; expected an integer")
    expect(message(TypeError, lambda: jlora.init(0, PARAMS, ONE)), "key=0", "jax.random.key(0)")  # type: ignore[arg-type]


def test_a_matrix_that_is_used_oddly_is_left_out_by_name() -> None:
    params = {"odd": jnp.ones((6, 4)), "even": jnp.ones((6, 4))}
    uses = jlora.trace(lambda p, x: (x @ jnp.exp(p["odd"]), x @ p["even"]), params, jnp.ones((2, 6)))
    found = jlora.plan(params, jlora.LoraConfig(rank=2), uses)
    assert set(found) == {"even"}
    assert "consumed by exp" in found.left_out["odd"]


def test_a_plan_makes_the_adapters_of_its_config() -> None:
    config = dataclasses.replace(ONE, train_also=("head",), dtype="bfloat16")
    made = jlora.init(jax.random.key(0), PARAMS, jlora.plan(PARAMS, config))
    chex.assert_trees_all_equal(made, jlora.init(jax.random.key(0), PARAMS, config))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.bfloat16.dtype}


def test_a_plan_of_other_params_is_refused() -> None:
    plan = jlora.plan(PARAMS, dataclasses.replace(ONE, train_also=("head", "norm")))
    other = {**PARAMS, "head": {"kernel": jnp.ones((4, 3))}, "layer_0": {"qeury": PARAMS["layer_0"]["query"]}}
    text = message(ValueError, lambda: jlora.init(jax.random.key(0), other, plan))
    expect(
        text, "'layer_0/query/kernel' is missing (closest: 'layer_0/qeury/kernel'", "'layer_0/norm/scale' is missing"
    )
    expect(text, "'head/kernel' has shape (4, 3), (4, 2) in the plan", "jlora.plan")
    expect(message(TypeError, lambda: jlora.init(jax.random.key(0), PARAMS, plan, {})), "uses", "plan")


def test_shapes_are_no_values_to_copy() -> None:
    shapes = jax.eval_shape(lambda: PARAMS)
    assert set(jlora.init(jax.random.key(0), shapes, ONE)) == {"layer_0/query/kernel"}
    config = dataclasses.replace(ONE, train_also=("head",))
    text = message(TypeError, lambda: jlora.init(jax.random.key(0), shapes, config))
    expect(text, "the params are shapes", "head/kernel", "jax.eval_shape")


def test_arguments_of_another_kind_are_refused() -> None:
    uses = jlora.trace(model, PARAMS, jnp.ones((1, 4)))
    key, wrong = jax.random.key(0), {"rank": 4}
    expect(message(TypeError, lambda: jlora.plan(PARAMS, wrong, uses)), "a dict as the config")  # type: ignore[arg-type]
    expect(message(TypeError, lambda: jlora.init(key, PARAMS, uses, ONE)), "as the config", "jlora.LoraConfig")  # type: ignore[arg-type]
    expect(message(TypeError, lambda: jlora.plan(PARAMS, ONE, model)), "a function as the uses", "jlora.trace")  # type: ignore[arg-type]
    expect(message(TypeError, lambda: jlora.plan(PARAMS, ONE, PARAMS)), "a dict as the uses")
    text = message(TypeError, lambda: jlora.init(PARAMS, key, ONE))  # type: ignore[arg-type]
    expect(text, "init: got key={", "expected a PRNG key")
    assert "\n" not in text and len(text) < 250


def test_an_override_of_a_leaf_that_is_not_adapted_says_why() -> None:
    def text(**fields: Any) -> str:
        config = dataclasses.replace(ONE, overrides=(jlora.Override("head", rank=1),), **fields)
        return message(ValueError, lambda: jlora.plan(PARAMS, config))

    expect(text(train_also=("head",)), "matches no adapted weight: 'head/kernel' is trained whole")
    expect(text(targets=("layer_0/query", "head")), "'head/kernel' is excluded")
    expect(text(), "'head/kernel' is not a target")


# ---- attach, detach


def test_adapters_that_do_not_fit_are_all_named() -> None:
    good = adapters()["layer_0/query/kernel"]
    wrong = {
        "layer_0/query/kernel": dataclasses.replace(good, b=jnp.zeros((2, 7))),
        "head/kernel": good,
        "ids": jnp.ones(4),
    }
    text = message(ValueError, lambda: jlora.attach(PARAMS, wrong))
    expect(
        text,
        "3 of 3",
        "b has shape (2, 7), expected (2, 6)",
        "'head/kernel'",
        "the trained leaf has shape (4,), expected (3,)",
    )
    text = message(KeyError, lambda: jlora.attach(PARAMS, {"layer_0/qeury/kernel": good, "nope": good}))
    expect(text, "params has the path\n  - 'layer_0/qeury/kernel' (closest: 'layer_0/query/", "\n  - 'nope'")


def test_attaching_twice_is_an_error() -> None:
    tree = jlora.attach(PARAMS, adapters())
    expect(message(ValueError, lambda: jlora.attach(tree, adapters())), "attached already", "jlora.detach")


def test_detach_needs_something_attached() -> None:
    expect(message(ValueError, lambda: jlora.detach(PARAMS)), "none of the 6 leaves carries an adapter")


def test_strengths_are_for_the_paths_of_the_factors() -> None:
    text = message(ValueError, lambda: jlora.attach(PARAMS, adapters(), strength=jnp.ones(3)))
    expect(text, "a strength is a scalar", "(3,)", "jax.vmap")
    expect(
        message(KeyError, lambda: jlora.attach(PARAMS, adapters(), strength={"nope": 1.0})),
        "layer_0/query/kernel",
        "nope",
    )


CAST: Any = lambda w: w.astype("bfloat16")  # noqa: E731
USES: list[Any] = [
    lambda w: w @ jnp.ones(6),
    lambda w: jnp.ones(4) @ w,
    lambda w: jnp.dot(jnp.ones(4), w),
    lambda w: w.T,
    lambda w: w[0],
    lambda w: jnp.asarray(w),
    lambda w: np.asarray(w),
    lambda w: w * 2,
    CAST,
    lambda w: jnp.exp(w),
]
"""Uses of a weight as an array of shape 4 x 6."""


@pytest.mark.parametrize("use", USES)
def test_an_attached_weight_refuses_functions_that_are_not_wrapped(use: Any) -> None:
    weight = jlora.attach(PARAMS, adapters())["layer_0"]["query"]["kernel"]
    assert (weight.shape, weight.ndim, weight.size, weight.dtype) == ((4, 6), 2, 24, jnp.float32)
    expect(message(TypeError, lambda: use(weight)), "'layer_0/query/kernel'", "jlora.lora(model.apply)", "jlora.merge")


def test_a_quantized_weight_refuses_functions_that_are_not_wrapped() -> None:
    weight = jlora.quantize(PARAMS, "int8")["layer_0"]["query"]["kernel"]
    assert (weight.shape, weight.ndim, weight.size, weight.dtype) == ((4, 6), 2, 24, jnp.float32)
    for use in USES:
        if use is not CAST:
            text = message(TypeError, lambda use=use: use(weight))
            expect(text, "int8, shape (4, 6)", "jlora.lora(model.apply)", "jlora.dequantize")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_lax_function_names_the_class_of_an_attached_weight(wrap: Any) -> None:
    weight = jlora.attach(PARAMS, adapters())["layer_0"]["query"]["kernel"]
    contract = wrap(lambda w: jax.lax.dot_general(jnp.ones((1, 4)), w, (((1,), (0,)), ((), ()))))
    text = message(TypeError, lambda: contract(weight))
    expect(text, "LoraWeight")
    assert "__jax_array__" not in text


def test_what_is_not_adapters_is_refused() -> None:
    plan, tree = jlora.plan(PARAMS, ONE), jlora.attach(PARAMS, adapters())
    functions: list[Any] = [jlora.attach, jlora.merge, jlora.unmerge, jlora.rounding]
    for call in functions:
        name = call.__name__
        expect(message(TypeError, lambda f=call: f(adapters(), PARAMS)), f"{name}: got adapters as the parameters")
        expect(message(TypeError, lambda f=call: f(PARAMS, [adapters()])), f"{name}: got a list as the adapters")
        text = message(TypeError, lambda f=call: f(PARAMS, plan))
        expect(text, "'layer_0/query/kernel': got a Target", "jlora.init(key, params, plan)")
        attached = {"layer_0/query/kernel": tree["layer_0"]["query"]["kernel"]}
        text = message(TypeError, lambda f=call, a=attached: f(PARAMS, a))
        expect(text, "got a LoraWeight", "jlora.detach")
    expect(message(TypeError, lambda: jlora.attach(PARAMS, [tree])), "jlora.detach")  # type: ignore[arg-type]
    expect(message(TypeError, lambda: jlora.stack(adapters())), "stack, adapters 0: got a str")  # type: ignore[arg-type]


def test_a_missing_path_is_listed_on_lines_of_its_own() -> None:
    good = adapters()["layer_0/query/kernel"]
    expect(message(KeyError, lambda: jlora.attach(PARAMS, {"nope": good})), "has the path\n  - 'nope'\nExpected")


def test_dropout_keys_are_checked() -> None:
    for wrong in (3, jnp.ones(2)):
        expect(message(TypeError, lambda w=wrong: jlora.attach(PARAMS, adapters(), dropout_key=w)), "got dropout_key=")  # type: ignore[arg-type]
    several = jax.random.split(jax.random.key(0))
    for call in (
        lambda: jlora.attach(PARAMS, adapters(), dropout_key=several),
        lambda: jlora.init(jax.random.key_data(several), PARAMS, ONE),
    ):
        expect(message(TypeError, call), "got keys of shape (2,)", "jax.vmap")


# ---- lora


def test_what_is_not_a_function_is_refused() -> None:
    pair: Any = (model, model)
    tree = jlora.attach(PARAMS, adapters())
    expect(message(TypeError, lambda: jlora.trace(pair, PARAMS)), "trace: got a tuple as the function", "model.apply")
    expect(message(TypeError, lambda: jlora.lora(pair)), "lora: got a tuple")
    expect(message(TypeError, lambda: jlora.explain(pair, tree)), "explain: got a tuple")


def test_adapters_that_are_not_attached_are_noted_where_the_function_fails() -> None:
    with pytest.raises(KeyError) as caught:
        jlora.lora(model)(adapters(), jnp.ones((1, 4)))
    expect(" ".join(caught.value.__notes__), "apply(jlora.attach(params, adapters), ...)")
    with pytest.raises(KeyError) as caught:
        jlora.lora(model)({}, jnp.ones((1, 4)))
    assert not hasattr(caught.value, "__notes__")


def test_a_weight_that_is_never_read_is_an_error() -> None:
    tree = jlora.attach(PARAMS, adapters())
    text = message(ValueError, lambda: jlora.lora(lambda p, x: model(PARAMS, x))(tree, jnp.ones((1, 4))))
    expect(text, "1 attached weight(s)", "'layer_0/query/kernel'", "closes over the parameters")


def test_a_materialized_weight_is_warned_of_once_with_every_primitive() -> None:
    tree = jlora.attach(PARAMS, adapters())

    def fn(params: Any) -> Any:
        w = params["layer_0"]["query"]["kernel"]
        return [jnp.exp(w) for _ in range(3)], jnp.sin(w)

    with pytest.warns(jlora.MaterializeWarning) as caught:
        jlora.lora(fn)(tree)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 1, texts
    expect(texts[0], "'layer_0/query/kernel' of shape (4, 6)", "'exp'", "'sin'", 'materialize="allow"')
    assert "test_errors.py" in texts[0]
    assert caught[0].filename == __file__
    text = message(jlora.MaterializeError, lambda: jlora.lora(fn, materialize="error")(tree))
    expect(text, "'exp'", "Exclude the weight from the targets")
    jlora.lora(fn, materialize="allow")(tree)


def test_what_happens_inside_a_library_is_reported_at_the_callers_line() -> None:
    """Equations in functions that JAX jits have no user line: the innermost one around them that has a line counts."""

    def fn(params: Any, x: Any) -> Any:
        w = params["layer_0"]["query"]["kernel"]
        most = jax.nn.gelu(w).max()
        inner = jax.jit(lambda w: jax.checkpoint(jax.nn.logsumexp)(w))(w)
        return x @ (w / most), inner

    lines = fn.__code__.co_firstlineno + np.array([2, 3])
    tree = jlora.attach(PARAMS, adapters())
    with pytest.warns(jlora.MaterializeWarning) as caught:
        jlora.lora(fn)(tree, jnp.ones((1, 4)))
    for where in (
        [str(w.message) for w in caught],
        [e.source for e in jlora.explain(fn, tree, jnp.ones((1, 4))).events],
    ):
        assert all("test_errors.py:" in text for text in where), where
        assert all(any(f"test_errors.py:{line}" in text for text in where) for line in lines), where
    uses = jlora.trace(fn, PARAMS, jnp.ones((1, 4)))["layer_0/query/kernel"].uses
    assert uses and all("test_errors.py:" in use.source for use in uses)


def test_returning_a_changed_weight_warns_and_an_unchanged_one_stays_attached() -> None:
    tree = jlora.attach(PARAMS, adapters())
    with pytest.warns(jlora.MaterializeWarning, match="'return'.*merged"):
        half, same = jlora.lora(lambda p: (p["layer_0"]["query"]["kernel"] / 2, p["layer_0"]["query"]["kernel"]))(tree)
    assert half.shape == (4, 6)
    assert same is tree["layer_0"]["query"]["kernel"]


# ---- merge, unmerge


def test_nan_is_found_at_merge_and_named() -> None:
    bad = adapters()
    factors = bad["layer_0/query/kernel"]
    bad["layer_0/query/kernel"] = dataclasses.replace(factors, b=factors.b.at[0, 0].set(jnp.nan))
    bad["head/kernel"] = jnp.full((4, 2), jnp.inf)
    expect(
        message(ValueError, lambda: jlora.merge(PARAMS, bad)),
        "NaN or infinity",
        "2 of 2",
        "'layer_0/query/kernel'",
        "'head/kernel'",
    )
    jax.eval_shape(jlora.merge, PARAMS, bad)  # while tracing there is nothing to look at


def test_merging_closed_over_adapters_under_jit_is_checked_too() -> None:
    made = adapters()
    jax.jit(lambda p: jlora.merge(p, made))(PARAMS)
    made["head/kernel"] = jnp.full((4, 2), jnp.nan)
    expect(message(ValueError, lambda: jax.jit(lambda p: jlora.merge(p, made))(PARAMS)), "'head/kernel'")


def test_unmerge_refuses_what_it_cannot_undo() -> None:
    config = dataclasses.replace(ONE, use_dora=True, train_also=("head",))
    made = jlora.init(jax.random.key(0), PARAMS, config)
    text = message(ValueError, lambda: jlora.unmerge(jlora.merge(PARAMS, made), made))
    expect(text, "2 of 2", "'layer_0/query/kernel': DoRA", "'head/kernel': it was trained whole", "jlora.detach")


# ---- optax


@pytest.mark.parametrize("call", [jlora.labels, jlora.trainable_mask, jlora.partition])
def test_a_tree_with_nothing_to_train_is_an_error(call: Any) -> None:
    expect(message(ValueError, lambda: call(PARAMS)), "none of the 6 leaves is trainable", "jlora.attach")

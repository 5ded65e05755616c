"""Laws of the count of operations: it is what one counts by hand, however the program is put together."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jlora
from train.compute.flops import count, peak

SQUARE = 2 * 8**3
"""Of a product of two 8 by 8 matrices."""


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def square(x: jax.Array) -> jax.Array:
    return x @ x


def total(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A loss of which every part of ``fn``'s result, and its value, is needed."""
    return lambda *args: (fn(*args) ** 2).sum()


def flops_of_xla(fn: Callable[..., Any], *args: Any) -> float:
    analysis: Any = jax.jit(fn).lower(*args).compile().cost_analysis()
    return analysis["flops"]


# Products


@pytest.mark.parametrize(
    ("subscripts", "shapes", "expected"),
    [
        ("ij,jk->ik", [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
        ("ij,jk->ki", [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
        ("j,j->", [(4,), (4,)], 2 * 4),
        ("bqhd,bkhd->bhqk", [(2, 5, 3, 4), (2, 7, 3, 4)], 2 * (2 * 3) * 5 * 4 * 7),
        ("ij,kl->ijkl", [(3, 4), (5, 6)], 2 * 3 * 4 * 5 * 6),
        ("abij,abjk->ik", [(2, 3, 4, 5), (2, 3, 5, 6)], 2 * 2 * 3 * 4 * 5 * 6),
    ],
)
def test_a_product_costs_two_operations_per_term(subscripts: str, shapes: list[tuple[int, ...]], expected: int) -> None:
    assert count(lambda *xs: jnp.einsum(subscripts, *xs), *(array(*shape) for shape in shapes)) == expected


def test_a_batch_costs_as_much_as_its_examples() -> None:
    one = count(jnp.dot, array(3, 4), array(4, 5))
    assert count(jax.vmap(jnp.dot), array(7, 3, 4), array(7, 4, 5)) == 7 * one
    assert count(jax.vmap(jnp.dot, (0, None)), array(7, 3, 4), array(4, 5)) == 7 * one


def test_ragged_products_cost_as_if_all_rows_were_used_and_so_do_their_gradients() -> None:
    args = (array(10, 4), array(3, 4, 5), array(3, dtype=jnp.int32))
    assert count(lax.ragged_dot, *args) == 2 * 10 * 4 * 5
    assert count(jax.value_and_grad(total(lax.ragged_dot), argnums=(0, 1)), *args) == 3 * 2 * 10 * 4 * 5


# Convolutions


def conv(**options: Any) -> Callable[[Any, Any], jax.Array]:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda x, kernel: lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    ("options", "kernel", "terms"),
    [
        ({"window_strides": (1, 1)}, (3, 3, 6, 8), 9 * 7 * 3 * 3 * 6 * 8),
        ({"window_strides": (2, 2)}, (3, 3, 6, 8), 5 * 4 * 3 * 3 * 6 * 8),
        ({"window_strides": (1, 1), "feature_group_count": 2}, (3, 3, 3, 8), 9 * 7 * 3 * 3 * 3 * 8),
        ({"window_strides": (1, 1), "feature_group_count": 6}, (3, 3, 1, 6), 9 * 7 * 3 * 3 * 6),
        ({"window_strides": (1, 1), "rhs_dilation": (2, 2)}, (3, 3, 6, 8), 7 * 5 * 3 * 3 * 6 * 8),
    ],
)
def test_a_convolution_costs_two_operations_per_output_and_kernel_element(
    options: dict[str, Any], kernel: tuple[int, ...], terms: int
) -> None:
    assert count(conv(padding="VALID", **options), array(4, 11, 9, 6), array(*kernel)) == 2 * 4 * terms


STRANGE: list[dict[str, Any]] = [
    {"window_strides": (2, 3), "padding": "SAME"},
    {"window_strides": (2, 2), "padding": ((2, 3), (1, 0)), "rhs_dilation": (2, 1)},
    {"window_strides": (1, 1), "padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 2)},
    {"window_strides": (3, 1), "padding": "SAME", "feature_group_count": 2},
    {"window_strides": (1, 2), "padding": "SAME", "batch_group_count": 2},
]


@pytest.mark.parametrize("options", STRANGE)
def test_padding_and_holes_cost_nothing(options: dict[str, Any]) -> None:
    """What is multiplied with zeros that nobody wrote is not counted; neither does XLA count it."""
    args = (array(4, 11, 9, 6), array(3, 3, 6 // options.get("feature_group_count", 1), 8))
    assert count(conv(**options), *args) == pytest.approx(flops_of_xla(conv(**options), *args), rel=0.01)


@pytest.mark.parametrize("options", STRANGE)
def test_each_gradient_of_a_convolution_costs_as_much_as_it(options: dict[str, Any]) -> None:
    args = (array(4, 11, 9, 6), array(3, 3, 6 // options.get("feature_group_count", 1), 8))
    both = jax.value_and_grad(total(conv(**options)), argnums=(0, 1))
    assert count(both, *args) == 3 * count(conv(**options), *args)


# Programs


@jax.custom_vjp
def with_own_vjp(x: jax.Array) -> jax.Array:
    return square(x)


with_own_vjp.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x.T + x.T @ g,))


@jax.custom_jvp
def with_own_jvp(x: jax.Array) -> jax.Array:
    return square(x)


with_own_jvp.defjvp(lambda x, t: (square(x[0]), t[0] @ x[0] + x[0] @ t[0]))


@pytest.mark.parametrize(
    "wrapped",
    [jax.jit(square), jax.checkpoint(square), with_own_vjp, with_own_jvp, jax.jit(jax.checkpoint(jax.jit(square)))],  # type: ignore[arg-type]
    ids=["jit", "checkpoint", "custom_vjp", "custom_jvp", "nested"],
)
def test_a_wrapped_function_costs_as_much_as_the_function(wrapped: Callable[..., jax.Array]) -> None:
    assert count(wrapped, array(8, 8)) == SQUARE
    assert count(jax.jit(jax.value_and_grad(total(wrapped))), array(8, 8)) == 3 * SQUARE


def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_scan_costs_its_length() -> None:
    one = 2 * 3 * 8 * 8
    assert count(layers, array(3, 8), array(12, 8, 8)) == 12 * one
    assert count(jax.grad(total(layers), argnums=(0, 1)), array(3, 8), array(12, 8, 8)) == 3 * 12 * one
    assert count(lambda x: lax.fori_loop(0, 5, lambda _, x: square(x), x), array(8, 8)) == 5 * SQUARE
    assert count(lambda xs: lax.map(square, xs), array(6, 8, 8)) == 6 * SQUARE


def test_recomputation_is_counted_where_it_is_asked_for() -> None:
    """So the count of a model without `jax.checkpoint` is that of the model, and with it that of the machine."""

    def rematerialized(x: jax.Array, weights: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), None), x, weights)[0]

    args = (array(3, 8), array(12, 8, 8))
    assert count(jax.grad(total(rematerialized)), *args) == count(jax.grad(total(layers)), *args) + count(layers, *args)


def test_of_a_branch_the_dearest_counts_and_a_while_loop_counts_once() -> None:
    assert count(lambda i, x: lax.switch(i, [square, lambda x: square(square(x)), jnp.tanh], x), 0, array(8, 8)) == (
        2 * SQUARE
    )
    assert count(lambda x: lax.while_loop(lambda x: x[0, 0] < 1, square, x), array(8, 8)) == SQUARE


def test_what_no_result_depends_on_costs_nothing() -> None:
    def linear(x: jax.Array, w: jax.Array) -> jax.Array:
        return (x @ w).sum()

    assert count(jax.value_and_grad(linear), array(3, 4), array(4, 5)) == 2 * (2 * 3 * 4 * 5)
    assert count(jax.grad(linear), array(3, 4), array(4, 5)) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("axes", [{"rows"}, {"rows", "columns"}])
def test_devices_share_the_work_of_a_shard_map(axes: set[str]) -> None:
    """Whatever axes are manual, the devices together do what one would do."""
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto, AxisType.Auto))
    x, w = PartitionSpec("rows"), PartitionSpec(None, "columns" if "columns" in axes else None)
    out = PartitionSpec("rows", "columns" if "columns" in axes else None)
    sharded = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(x, w), out_specs=out, axis_names=axes)
    assert count(sharded, array(8, 16), array(16, 32)) == count(jnp.dot, array(8, 16), array(16, 32))


# Training steps

TOKENS, WIDTHS, RANK = 50, (16, 32, 24, 8), 4
MATRICES = list(zip(WIDTHS, WIDTHS[1:], strict=False))


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for i in range(len(MATRICES)):
        x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"])
    return x


def mlp_params() -> Any:
    return {f"layer_{i}": {"kernel": jnp.ones(shape)} for i, shape in enumerate(MATRICES)}


def test_full_fine_tuning_costs_six_operations_per_token_and_weight() -> None:
    """Two forward, two for the weights' gradient, two for the activations', of which the first layer has none."""
    weights = sum(a * b for a, b in MATRICES)
    expected = 6 * TOKENS * weights - 2 * TOKENS * WIDTHS[0] * WIDTHS[1]
    assert count(jax.value_and_grad(total(mlp)), mlp_params(), array(TOKENS, WIDTHS[0])) == expected


def test_lora_costs_four_operations_per_token_and_weight_and_six_per_token_and_factor() -> None:
    """No gradient of a frozen weight; the first layer has no gradient of its activations either."""
    x = array(TOKENS, WIDTHS[0])
    params = mlp_params()
    config = jlora.LoraConfig(rank=RANK)
    adapters = jlora.init(jax.random.key(0), params, config, jlora.trace(mlp, params, jnp.ones(x.shape)))
    adapted = jlora.lora(mlp)
    step = jax.value_and_grad(total(lambda adapters, x: adapted(jlora.attach(params, adapters), x)))

    first, second = WIDTHS[:2]
    weights, factors = sum(a * b for a, b in MATRICES), sum(RANK * (a + b) for a, b in MATRICES)
    expected = 4 * TOKENS * weights - 2 * TOKENS * first * second + 6 * TOKENS * factors - 2 * TOKENS * first * RANK
    only_factors = {path: one for path, one in adapters.items() if isinstance(one, jlora.LoraFactors)}
    assert len(only_factors) == len(MATRICES)
    assert count(step, only_factors, x) == expected


def test_the_count_is_that_of_xla() -> None:
    """On a network of products alone, without a loop."""

    def attend(params: Any, x: jax.Array) -> jax.Array:
        for layer in params:
            q, k, v = (jnp.einsum("btw,whd->bthd", x, layer[name]) for name in "qkv")
            x = jnp.einsum("bqk,bkhd,hdw->bqw", jnp.einsum("bqhd,bkhd->bqk", q, k), v, layer["o"])
        return x

    layer = {**{name: array(64, 4, 16) for name in "qkv"}, "o": array(4, 16, 64)}
    for fn in (attend, jax.value_and_grad(total(attend))):
        found = count(fn, [layer] * 3, array(2, 128, 64))
        assert found == pytest.approx(flops_of_xla(fn, [layer] * 3, array(2, 128, 64)), rel=0.01)


# Devices


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("TPU v2", 22.5),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v4 lite", 138),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_the_peak_of_a_known_device(kind: str, teraflops: float) -> None:
    assert peak(SimpleNamespace(device_kind=kind)) == teraflops * 1e12


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA RTX A1000",
        "NVIDIA T400",
        "NVIDIA A10G",
        "NVIDIA B2000",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "TPU v9",
    ],
)
def test_a_peak_is_never_guessed(kind: str) -> None:
    """A device whose name is like a known one's is not known, nor is a slice of a known one."""
    assert peak(SimpleNamespace(device_kind=kind)) is None


def test_the_peak_here() -> None:
    assert peak(jax.devices("cpu")[0]) is None

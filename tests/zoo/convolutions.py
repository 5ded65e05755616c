"""Convolutions as `lax` writes them: every layout, stride, dilation and grouping; transposed ones too."""

from __future__ import annotations

from typing import Any

from jax import lax

from ._model import Axes, Model, dense, model, normal, weights

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
HWIO, OIHW = dense((0, 1, 2), 3), dense((1, 2, 3), 0)


def _conv(kernel: tuple[int, ...], image: tuple[int, ...], layout: Any, axes: Axes, stride: int = 1, **options: Any):
    def fn(p: Any, x: Any) -> Any:
        strides = (stride,) * (len(kernel) - 2)
        return lax.conv_general_dilated(x, p["k"], strides, "SAME", dimension_numbers=layout, **options)

    return Model(fn, weights(k=kernel), (normal(*image),), {"k": axes})


@model
def nhwc() -> Model:
    return _conv((3, 3, 4, 5), (2, 6, 6, 4), NHWC, HWIO)


@model
def nchw() -> Model:
    return _conv((5, 4, 3, 3), (2, 4, 6, 6), NCHW, OIHW)


@model
def strided() -> Model:
    return _conv((3, 3, 4, 5), (2, 7, 7, 4), NHWC, HWIO, stride=2)


@model
def dilated() -> Model:
    return _conv((5, 4, 3, 3), (2, 4, 6, 6), NCHW, OIHW, rhs_dilation=(2, 2))


@model
def grouped() -> Model:
    return _conv((3, 3, 2, 6), (2, 6, 6, 4), NHWC, HWIO, feature_group_count=2)


@model
def depthwise() -> Model:
    return _conv((8, 1, 3, 3), (2, 4, 6, 6), NCHW, OIHW, feature_group_count=4)


@model
def one_dimension() -> Model:
    return _conv((3, 4, 5), (2, 6, 4), ("NWC", "WIO", "NWC"), dense((0, 1), 2))


@model
def three_dimensions() -> Model:
    return _conv((2, 2, 2, 3, 4), (1, 3, 3, 3, 3), ("NDHWC", "DHWIO", "NDHWC"), dense((0, 1, 2, 3), 4))


@model
def transposed() -> Model:
    def fn(p: Any, x: Any) -> Any:
        return lax.conv_transpose(x, p["k"], (2, 2), "SAME", dimension_numbers=NHWC)

    return Model(fn, weights(k=(3, 3, 4, 5)), (normal(2, 3, 3, 4),), {"k": HWIO})


@model
def transposed_flipped() -> Model:
    """The gradient of a convolution: the kernel is turned around, its channels swapped."""

    def fn(p: Any, x: Any) -> Any:
        return lax.conv_transpose(x, p["k"], (2, 2), "SAME", dimension_numbers=NHWC, transpose_kernel=True)

    return Model(fn, weights(k=(3, 3, 5, 4)), (normal(2, 3, 3, 4),), {"k": dense((0, 1, 3), 2)})


@model
def batch_groups() -> Model:
    """Groups along the batch, as in the gradient of a grouped convolution: not a layer's product."""
    made = _conv((3, 3, 4, 6), (2, 6, 6, 4), NHWC, HWIO, batch_group_count=2)
    return Model(made.fn, made.params, made.args, made.axes, materialized={"k": "batch groups"})

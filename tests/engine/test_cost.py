"""What a step costs, as far as it does not depend on the machine: the same numbers as `benchmarks/`, at small sizes."""

from __future__ import annotations

import pytest

from benchmarks import _encoder, _measure, stacked_layers, step_time

# 111 tokens, widths 128 and 512, heads of 64: no activation has the shape of a weight.
SHAPE = _encoder.Shape(layers=1, width=128, batch=3, tokens=37)


@pytest.fixture(scope="module")
def programs() -> dict[str, _measure.Program]:
    """The compiled training step of every variant."""
    params, factors = _encoder.make_params(SHAPE, "float32"), _encoder.make_factors(SHAPE)
    return step_time.make_steps(params, factors, _encoder.make_batch(SHAPE, "float32"))[0]


@pytest.mark.slow
def test_flops_are_those_of_lora_by_hand(programs: dict[str, _measure.Program]) -> None:
    """The step does no more arithmetic than the factored one that everyone writes."""
    assert programs["jlora"].flops <= 1.02 * programs["factored"].flops
    assert programs["jlora"].flops < 0.85 * programs["full"].flops


def test_memory_is_that_of_the_same_product_by_hand(programs: dict[str, _measure.Program]) -> None:
    """The interpreter keeps nothing alive that a hand-written product with the same gradient would not."""
    assert programs["jlora"].temporary_memory <= 1.02 * programs["oriented"].temporary_memory


def test_no_gradient_of_a_weight(programs: dict[str, _measure.Program]) -> None:
    """No matmul of the compiled step has a weight's shape; full fine-tuning has one for each weight."""
    weights = [SHAPE.linear(name) for name in _encoder.LINEARS]
    count = {name: _measure.weight_shaped_dots(program.text, weights) for name, program in programs.items()}
    assert count["full"] == SHAPE.layers * len(weights)
    assert count["jlora"] == 0


def test_no_activation_is_transposed_more_than_by_the_bare_model(programs: dict[str, _measure.Program]) -> None:
    """The gradient is oriented so that XLA:CPU moves no activation on its behalf."""
    moves = {name: _measure.moved(programs[name].text, SHAPE.width * SHAPE.batch * SHAPE.tokens) for name in programs}
    assert moves["jlora"] <= moves["limit"] < moves["factored"]


def test_depth_costs_no_equations() -> None:
    """A scanned stack stays a scan: its gradient has as many equations at 48 layers as at 2."""
    assert stacked_layers.count_equations(48, 32) == stacked_layers.count_equations(2, 32)

"""The GPU benchmark at toy size: its ways to train compute the same thing, and its parts run where there is no GPU."""

import pytest

from benchmarks import gpu_step


@pytest.mark.slow
@pytest.mark.parametrize("part", ["flash", "members"])
def test_a_part_runs_at_toy_size_and_its_losses_agree(part):
    figures = gpu_step.measure(part, gpu_step.SIZES["toy"], rounds=1)
    if part == "flash":
        assert figures["jlora"]["flops"] <= 1.02 * figures["by hand"]["flops"]
        assert figures["by hand"]["flops"] < 0.8 * figures["full"]["flops"]
    else:  # equal losses: each member trains as it does alone
        apart, together = (figures[name]["loss"] for name in ("one after the other", "in one program"))
        assert together == pytest.approx(apart, rel=2e-2)
    for name in figures:
        assert name in gpu_step.show(part, figures)

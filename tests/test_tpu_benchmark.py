"""The TPU benchmarks at toy size: their programs compute the same thing, and their results are kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _tpu, attention, tpu_plans, tpu_step

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
TOY = tpu_step.Point("toy", 4, 32, "full", rank=4)
DOCS = Path(__file__).parents[1] / "docs"


def test_the_programs_of_a_step_compute_the_same_loss() -> None:
    """With B = 0 that of the bare model; and one step moves the adapters alike."""
    steps = tpu_step.Steps(TOY, jax.devices()[:1])
    key = jax.random.key(0)
    params = {"params": steps.model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]}
    tokens = jax.random.randint(key, steps.tokens.shape, 0, 256)
    _, expected = jax.jit(steps.limit)(jnp.zeros(steps.added.shape, steps.added.dtype), params, tokens)
    adapters = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), steps.adapters)
    adapters = {path: _without_b(factors) for path, factors in adapters.items()}
    by_hand = {path: (jnp.zeros if path[-1] == "lora_b" else jnp.ones)(x.shape) for path, x in steps.factors().items()}
    moved = []
    for program, trained in ((steps.jlora, adapters), (steps.by_hand, by_hand)):
        (trained, _), loss = jax.jit(program)((trained, steps.optimizer.init(trained)), params, tokens)
        np.testing.assert_allclose(loss, expected, rtol=1e-3)
        moved.append(sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(trained)))
    assert moved[0] == pytest.approx(moved[1], rel=1e-3)


def _without_b(factors):
    return type(factors)(**{**vars(factors), "b": jnp.zeros(factors.b.shape, factors.b.dtype)})


@needs_libtpu
def test_a_step_and_a_product_are_compiled_for_a_tpu() -> None:
    devices = _tpu.slice_devices("v5e:2x4")
    steps = tpu_step.Steps(TOY, devices)
    found = {program: steps.cost(program) for program in ("limit", "by_hand", "jlora")}
    assert 0 < found["limit"]["cycles"] < found["jlora"]["cycles"]
    split = tpu_step.Steps(tpu_step.Point("toy", 8, 32, "full", 4, (2, 4)), devices)
    assert split.cost("by_hand")["collectives"]
    bare, ours = (tpu_step.product_cost(form, (256, 128, 128), 8, devices[0]) for form in ("bare", "jlora"))
    assert 0 < bare["cycles"] < ours["cycles"]


@needs_libtpu
def test_results_are_kept_until_their_code_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, made = tmp_path / "kept.json", []

    def get(*code: str, stale: bool = False) -> object:
        return _tpu.Results(file, stale=stale).get("a", lambda: made.append(1) or {"cycles": len(made)}, *code)

    assert get(stale=True) is None
    assert get("jlora/fields.py") == get("jlora/fields.py") == get("train/messages.py", stale=True) and len(made) == 1
    assert get("train/messages.py") != get("jlora/fields.py") and len(made) == 3


@pytest.mark.parametrize("page", ["tpu.md", "speed.md"])
def test_pages_have_the_tables_that_are_kept(page: str) -> None:
    """Those that ``--tables`` writes."""
    if page == "tpu.md":
        tables = [tpu_plans.table(_tpu.Results(tpu_plans.FILE, stale=True))]
    else:
        results = _tpu.Results(tpu_step.FILE, stale=True)
        tables = [tpu_step.part_table(results, part) for part in tpu_step.PARTS]
        tables.append(attention.tpu_table(_tpu.Results(attention.FILE, stale=True)))
    for table in tables:
        assert table in (DOCS / page).read_text(), f"write the tables of docs/{page} with --tables"

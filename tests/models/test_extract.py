"""`jlora.models.extract` and its command: adapters from two checkpoints, one leaf at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import models, peft
from tests.messages import expect, message
from tests.small_checkpoints import change, network
from train.__main__ import main

NOT_IN_BASE = ("classifier.weight", "classifier.bias")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Any, Any]:
    """A base without a head and its fine-tune, whose matrices changed by rank 2 and all else freely; their params."""
    model, params = network()
    rng = np.random.default_rng(1)

    def moved(x: Any) -> Any:
        noise = rng.normal(size=x.shape)
        if x.ndim == 2:
            u, s, vh = np.linalg.svd(noise, full_matrices=False)
            noise = (u * np.where(np.arange(len(s)) < 2, s, 0)) @ vh
        return x + jnp.asarray(0.1 * noise, x.dtype)

    tuned = jax.tree.map(moved, params)
    models.save(tmp_path / "base", model, params)
    models.save(tmp_path / "tuned", model, tuned)
    change(tmp_path / "base", lambda tensors: {n: x for n, x in tensors.items() if n not in NOT_IN_BASE})
    return tmp_path / "base", tmp_path / "tuned", params, tuned


@pytest.mark.slow
def test_a_fine_tune_is_its_base_with_the_extracted_adapters(
    pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, in PEFT's format, with no config: matrices and tables get factors, the rest is whole."""
    base, tuned, params, weights = pair
    out = tmp_path / "out"
    assert main(["extract", str(base), str(tuned), "--rank", "2", "--to", "peft", "--out", str(out)]) == 0
    expect(capsys.readouterr().out, "energy kept", "kept in all: 100.00%", "taken whole", str(out))
    model = models.build(tuned)
    adapters, _ = peft.load(out, models.tensor_names(model), params)
    merged = jlora.merge(params, adapters)
    for path, leaf in jlora.named_leaves(merged)[0].items():
        np.testing.assert_allclose(leaf, jlora.named_leaves(weights)[0][path], atol=2e-5, err_msg=path)
    kinds = {path: isinstance(value, jlora.LoraFactors) for path, value in adapters.items()}
    assert not kinds["params/classifier/kernel"] and sum(kinds.values()) > 10


def test_what_does_not_fit_is_named(pair: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, *_ = pair
    config = jlora.LoraConfig(rank=2, train_also=("classifier", "bias", "scale", "embeddings"))
    text = message(ValueError, lambda: models.extract(base, tuned, jlora.LoraConfig(rank=2)))
    expect(text, "changed and are not in the plan", "bias'", "no config")
    found = models.extract(base, tuned, config)
    assert set(found.kept) == {path for path, value in found.adapters.items() if isinstance(value, jlora.LoraFactors)}
    whole = jlora.LoraConfig(rank=2, exclude=(), train_also=("scale", "bias", "embeddings"))
    expect(message(models.ModelError, lambda: models.extract(base, tuned, whole)), "lacks", "classifier", "train_also")
    assert main(["extract", str(base), str(tuned)]) == 2
    expect(capsys.readouterr().err, "--rank 16", "--energy 0.9")
    expect(message(TypeError, lambda: models.extract(base, tuned)), "neither")

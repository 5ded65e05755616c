"""Against PyTorch's peft: the same factors, up to signs, and the same residuals, from files and live."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from tests.golden.make_inits import CASES, FILE, LAYERS, inputs, made


@pytest.fixture(scope="module", params=["files", "live"])
def reference(request: pytest.FixtureRequest) -> Mapping[str, np.ndarray]:
    if request.param == "files":
        return load_file(FILE)
    for name in ("torch", "peft", "bitsandbytes"):
        pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made()


def model(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"]) @ params["down"]


def nf4(codes: np.ndarray) -> Any:
    """NF4 in blocks of 64, along the memory of PyTorch's layout."""

    def quantize(weight: Any) -> Any:
        blocks = weight.T.reshape(-1, 64)
        largest = jnp.abs(blocks).max(1, keepdims=True)
        nearest = jnp.abs((blocks / largest)[..., None] - codes).argmin(-1)
        return (jnp.asarray(codes)[nearest] * largest).reshape(weight.shape[::-1]).T

    return quantize


def decomposed(case: str, reference: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    arguments = CASES[case]
    params = {name: jnp.asarray(reference[f"base/{name}"].T) for name in LAYERS}
    config = jlora.LoraConfig(
        rank=arguments["r"], alpha=arguments["lora_alpha"], use_rslora=arguments.get("use_rslora", False)
    )
    x = jnp.asarray(inputs())
    plan = jlora.plan(params, config, jlora.trace(model, params, x))
    method = case if case == "corda_kpm" else arguments["init_lora_weights"]
    options: dict[str, Any] = {}
    if method in ("corda", "corda_kpm", "eva"):
        options["moments"] = jlora.input_moments(model, params, plan, x)
    if method == "eva":
        options["rho"] = arguments["eva_config"]["rho"]
    if method == "loftq":
        options |= {"quantizer": nf4(reference["nf4"]), "iterations": arguments["loftq_config"]["loftq_iter"]}
    return jlora.decompose(params, plan, method=method, **options)


@pytest.mark.parametrize("case", CASES)
def test_peft_has_the_same_factors_and_residuals(case: str, reference: Mapping[str, np.ndarray]) -> None:
    """Updates and residuals within 1e-4, and each column of A and row of B up to its sign."""
    residual, adapters = decomposed(case, reference)
    assert {f"{case}/{name}/A" for name in adapters} == {
        k for k in reference if k.startswith(case + "/") and k[-1] == "A"
    }
    for name, f in adapters.items():
        theirs = {key: reference[f"{case}/{name}/{key}"] for key in ("A", "B", "R", "scale")}
        assert f.scale == pytest.approx(float(theirs["scale"][0]))
        ours = np.asarray(f.a).T, np.asarray(f.b).T
        assert ours[0].shape == theirs["A"].shape and ours[1].shape == theirs["B"].shape
        update = theirs["scale"] * theirs["B"] @ theirs["A"]
        np.testing.assert_allclose(f.scale * ours[1] @ ours[0], update, atol=1e-4)
        np.testing.assert_allclose(np.asarray(residual[name]).T, theirs["R"], atol=1e-4)
        if case.startswith("corda"):  # its split between A and B depends in peft on the scale of the inputs
            ratio = np.linalg.norm(theirs["A"]) / np.linalg.norm(ours[0])
            ours = ours[0] * ratio, ours[1] / ratio
        signs = np.sign(np.sum(ours[0] * theirs["A"], 1))
        np.testing.assert_allclose(ours[0] * signs[:, None], theirs["A"], atol=1e-3)
        np.testing.assert_allclose(ours[1] * signs, theirs["B"], atol=1e-3)


@pytest.mark.parametrize("name", ["gaussian", "orthogonal"])
def test_random_factors_have_the_moments_of_pefts(name: str) -> None:
    """Mean, variance and kurtosis of A and B equal those of factors drawn by peft's own code."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(3000, 2000))
    config: Any = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=name)
    layer = peft.get_peft_model(linear, config).base_model.model[0]
    theirs = [factor.default.weight.detach().numpy() for factor in (layer.lora_A, layer.lora_B)]
    params = {"w": jnp.zeros((3000, 2000))}
    f: Any = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=4, targets=("w",), init=name))["w"]  # pyright: ignore[reportArgumentType]
    for ours, peft_ in zip((f.a, f.b), theirs, strict=True):
        assert np.mean(ours) == pytest.approx(np.mean(peft_), abs=5e-3)
        assert np.std(ours) == pytest.approx(np.std(peft_), rel=0.03)
    np.testing.assert_allclose(theirs[1] @ theirs[0] if name == "orthogonal" else 0, 0, atol=1e-6)
    np.testing.assert_allclose(f.a @ f.b, 0, atol=1e-6)

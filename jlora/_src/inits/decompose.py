"""`decompose`: adapters that start from the weights, with what is left of the weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora._src.algebra.matrices import from_matrices, update
from jlora._src.config import LoraConfig
from jlora._src.engine import compat
from jlora._src.inits import driven, quantized, spectral
from jlora._src.inits.moments import InputMoments
from jlora._src.paths import named_leaves, one_key, path_key
from jlora._src.quantized import QuantizedArray
from jlora._src.tree.init import check_values, copy_of, planned, with_magnitude
from jlora._src.tree.plan import Plan
from jlora._src.types import Array, LoraFactors, Path, PyTree, Target, Uses
from jlora.messages import bullets, nearest

Method = Literal["pissa", "olora", "loftq", "lq", "corda", "corda_kpm", "eva", "lora_ga"]
_METHODS: Mapping[str, Callable[..., Any]] = {
    "pissa": spectral.pissa,
    "olora": spectral.olora,
    "loftq": quantized.loftq,
    "lq": quantized.lq,
    "corda": driven.corda,
    "corda_kpm": driven.corda_kpm,
    "eva": driven.eva,
    "lora_ga": driven.lora_ga,
}
"""Each takes the leaf, its target and dtype, then its options by name, and returns the factors; `quantized`, also the
residual."""


def decompose(
    params: PyTree,
    plan: Plan | LoraConfig,
    uses: Uses | None = None,
    *,
    method: Method,
    key: Array | None = None,
    niter: int | None = None,
    quantizer: Callable[[Array], Any] | None = None,
    iterations: int | None = None,
    moments: Mapping[Path, InputMoments] | None = None,
    gradients: PyTree | None = None,
    rho: float | None = None,
) -> tuple[PyTree, dict[Path, LoraFactors | Array]]:
    """Adapters that start from the weights or from data, and the parameters that are left: ``(residual, adapters)``.

    Each weight is split as ``W = R + s·A·B``, so the adapted residual still computes what the model did. Train with
    ``attach(residual, adapters)``; `merge` them; or ship them without the residual, with `to_plain`.

    >>> residual, adapters = jlora.decompose(params, plan, method="pissa")
    >>> logits = jlora.lora(model.apply)(jlora.attach(residual, adapters), batch)

    The methods, with their options, and the PEFT names where these differ:

    - ``"pissa"``: A·B is the rank-r part of W with the largest singular values (Meng et al. 2024, eqs. 2 to 4,
      https://arxiv.org/abs/2404.02948). With ``niter`` and ``key``, by a randomized SVD with that many subspace
      iterations (``pissa_niter_4``).
    - ``"olora"``: the first columns and rows of a QR decomposition of Wᵀ (Büyükakyüz 2024,
      https://arxiv.org/abs/2406.01775).
    - ``"loftq"``: R = ``quantizer(W - s·A·B)``, and s·A·B the truncated SVD of W - R, in turn for ``iterations``
      rounds, 5 by default (Li et al. 2023, algorithm 1, https://arxiv.org/abs/2310.08659). Unlike PEFT's, A·B is
      divided by s, which PEFT leaves out: the same where ``alpha = rank``.
    - ``"lq"``: the same rounds, starting from the truncated SVD of W (Guo et al. 2023, section 3.1,
      https://arxiv.org/abs/2311.12023), and the best of their results by the Frobenius norm of W - R - s·A·B. The first
      round of LoftQ is a candidate too, so it is never worse than quantizing W and is at least as good as one LoftQ
      round.
    - ``"corda"``: A·B spans the directions that matter most for the inputs in ``moments``: the SVD of C·W with the
      second moment C of the inputs, multiplied by C⁻¹ (Yang et al. 2024, section 3,
      https://arxiv.org/abs/2406.05223; PEFT's ``ipm``). ``"corda_kpm"``: those that matter least.
    - ``"eva"``: the columns of A are the principal components of the inputs in ``moments``, and B = 0, so R = W
      (Paischer et al. 2024, https://arxiv.org/abs/2410.07170). Ranks move to the weights whose components explain most
      of their inputs' variance: no rank grows beyond ``rho`` (2 by default, 1 keeps them all) times the plan's, and
      weights whose rank falls to 0 get no adapter. Slices of a stacked weight share one rank, by their mean.
    - ``"lora_ga"``: A and B are the singular vectors of the loss's ``gradients`` in W, so that the first step is that
      of full fine-tuning (Wang et al. 2024, theorem 3.1 and algorithm 1, with a γ of 16,
      https://arxiv.org/abs/2407.05000). Best with ``use_rslora``.

    SVDs are taken in float32, of every slice of a stacked weight (scanned layers, experts), with all input and all
    output axes of a weight flattened. With ``use_dora``, magnitudes are the column norms of R + s·A·B.

    Args:
      params: the parameters.
      plan: from `plan`; or a config, planned first. `LoraConfig.init` is not used.
      uses: with a config, from `trace`.
      method: as above.
      key: for ``niter``.
      niter: for ``"pissa"``.
      quantizer: for ``"loftq"`` and ``"lq"``: a function of one float32 array, of a weight's shape. It returns the
        array as it is after quantization, or an object with a method ``dequantize``, which becomes the leaf of the
        residual. For ``"lq"`` the object is a pytree.
      iterations: for ``"loftq"`` and ``"lq"``.
      moments: for ``"corda"`` and ``"eva"``: from `input_moments`.
      gradients: for ``"lora_ga"``: a tree like ``params``, or ``{path: gradient}``, of at least the adapted weights.
      rho: for ``"eva"``.

    Returns:
      ``(residual, adapters)``: a tree like ``params``, each array in the dtype and memory kind of its weight, with
      leaves without an adapter shared; and ``{path: LoraFactors | array}`` as from `init`, in the config's dtype.

    Raises:
      ValueError: listing every weight for which the method is not defined: lookup tables, ranks above the rank of the
        weight, weights without moments or gradients; and as `init`.
      TypeError: for options that the method lacks or does not take, and for weights that are quantized already,
        listing all; and as `init`.
    """
    given = {
        "key": key, "niter": niter, "quantizer": quantizer, "iterations": iterations, "moments": moments,
        "gradients": gradients, "rho": rho,
    }  # fmt: skip
    options = _checked_options(method, {name: value for name, value in given.items() if value is not None})
    leaves, treedef, plan = planned("decompose", params, plan, uses)
    check_values("decompose", leaves, list(plan), "decomposed or copied")
    targets = {path: target for path, target in plan.items() if target.axes is not None}
    _check_stored(leaves, targets)
    _check_targets(method, targets, options)
    if method == "eva":
        targets = driven.redistributed(targets, plan.config, options["moments"], options.pop("rho", 2.0))
    if key is not None:
        options["key"] = one_key(key, "decompose", "key")
    dtype = plan.config.dtype
    residual, adapters = dict(leaves), {}
    with jax.default_matmul_precision("highest"):
        for path, target in plan.items():
            if target.axes is None:
                adapters[path] = copy_of(leaves[path], dtype)
            elif path in targets:
                residual[path], adapters[path] = _split(leaves[path], targets[path], method, options, dtype)
    return treedef.unflatten(residual.values()), adapters


def _check_stored(leaves: Mapping[Path, Any], targets: Mapping[Path, Target]) -> None:
    stored = {path: leaves[path] for path in targets if isinstance(leaves[path], QuantizedArray)}
    if stored:
        lines = bullets(f"{path!r}: {leaf.scheme}" for path, leaf in stored.items())
        raise TypeError(
            f"decompose: {len(stored)} of {len(targets)} weights are quantized:{lines}\nExpected the weights before "
            "their quantization: pass jlora.dequantize(params), and for a quantized residual method='loftq' or 'lq' "
            "with quantizer=jlora.quantize_array."
        )


def _split(leaf: Any, target: Target, method: str, options: Mapping[str, Any], dtype: str) -> tuple[Any, LoraFactors]:
    """The residual and the factors of one weight."""
    own = dict(options)
    for name in ("moments", "gradients"):
        if name in own:
            own[name] = own[name][target.path]
    if "key" in own:
        own["key"] = path_key(own["key"], target.path)
    weight = compat.to_device(leaf)
    found = _METHODS[method](weight, target, dtype, **own)
    if isinstance(found, LoraFactors):
        assert target.axes is not None
        rest = weight
        if method != "eva":
            change = from_matrices(update(found), target.axes, target.shape)
            rest = (weight.astype(jnp.float32) - change).astype(weight.dtype)
    else:
        rest, found = found
    if target.dora:
        found = with_magnitude(found, quantized.dequantized(rest).astype(weight.dtype), target.path, dtype)
    return compat.to_memory_of(rest, leaf) if isinstance(rest, jax.Array) else rest, found


def _checked_options(method: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a method, with trees by path.

    Raises:
      TypeError: for an unknown method, options that it does not take, and missing ones.
    """
    if method not in _METHODS:
        raise TypeError(
            f"decompose: got method={method!r}{nearest(str(method), _METHODS)}; expected one of {', '.join(_METHODS)}"
        )
    own = inspect.signature(_METHODS[method]).parameters.values()
    takes = {p.name: p.default is p.empty for p in own if p.kind is p.KEYWORD_ONLY}
    takes |= {"rho": False} if method == "eva" else {}
    wrong = [f"it takes no {name}" for name in given if name not in takes]
    wrong += [f"it needs {name}" for name, needed in takes.items() if needed and name not in given]
    if ("niter" in given) != ("key" in given) and "niter" in takes:
        wrong.append("niter and key belong together")
    if wrong:
        raise TypeError(f"decompose: method={method!r}:{bullets(wrong)}")
    for name in ("gradients", "moments"):
        if name in given and name == "gradients":
            given[name] = named_leaves(given[name])[0]
    return given


def _check_targets(method: str, targets: Mapping[Path, Target], options: Mapping[str, Any]) -> None:
    """Raises a ValueError listing every weight for which the method is not defined."""
    wrong = []
    for path, target in targets.items():
        assert target.axes is not None
        _, inputs, outputs = (math.prod(sizes) for sizes in target.axes.sizes(target.shape))
        most = min(inputs, outputs) // (2 if method == "lora_ga" else 1)
        if target.lookup:
            wrong.append(f"{path!r} is a lookup table, which has no product to decompose; name it in exclude")
        elif target.rank > most and method != "eva":
            what = "half of " if method == "lora_ga" else ""
            wrong.append(f"{path!r}: rank {target.rank}, expected at most {most}, {what}min(fan_in, fan_out)")
        for name in ("moments", "gradients"):
            if name in options and path not in options[name]:
                wrong.append(f"{path!r} is missing in {name}{nearest(path, options[name])}")
    if "gradients" in options:
        shapes = {path: tuple(options["gradients"][path].shape) for path in targets if path in options["gradients"]}
        wrong += [
            f"{path!r} has a gradient of shape {shape}, expected {targets[path].shape}"
            for path, shape in shapes.items()
            if shape != targets[path].shape
        ]
    if wrong:
        raise ValueError(f"decompose: method={method!r} is not defined for these weights:{bullets(wrong)}")

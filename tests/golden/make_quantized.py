"""What bitsandbytes makes of weights: `python tests/golden/make_quantized.py`, with bitsandbytes and torch, on a CPU.

Writes `quantized.safetensors`: its tables, ``nf4`` and ``dynamic``; and for each case the ``weight`` in PyTorch's
layout [outputs, inputs], ``nf4`` [entries] with ``absmax`` [blocks of 64 entries], these again as ``nested`` codes with
``nested_absmax`` [groups of 256 blocks] and ``offset``, and ``int8`` with its scales ``SCB`` [outputs].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "quantized.safetensors"
CASES = {"one-group": (24, 64), "two-groups": (256, 128), "large-and-zero": (64, 256)}
"""The shape of each weight. Its scales form whole groups of 256 in bitsandbytes' order and ours, or less than one."""


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=shape) * 0.05
    if name == "large-and-zero":
        drawn[0, :64], drawn[1] = 0, drawn[1] * 1000
    return drawn.astype(np.float16)


def computed(weight: np.ndarray) -> dict[str, np.ndarray]:
    """What bitsandbytes makes of a float32 weight."""
    import torch
    from bitsandbytes import functional

    given = torch.tensor(weight)
    packed, single = functional.quantize_4bit(given, quant_type="nf4", blocksize=64)
    nested = functional.quantize_4bit(given, quant_type="nf4", blocksize=64, compress_statistics=True)[1]
    codes, scales, _ = functional.int8_vectorwise_quant(given)
    bytes_ = packed.numpy().ravel()
    assert nested.state2 is not None and nested.offset is not None
    found = {
        "nf4": np.stack([bytes_ >> 4, bytes_ & 15], -1).ravel(),
        "absmax": single.absmax.numpy(),
        "nested": nested.absmax.numpy(),
        "nested_absmax": nested.state2.absmax.numpy(),
        "offset": nested.offset.numpy().reshape(1),
        "int8": codes.numpy(),
        "SCB": scales.numpy(),
    }
    theirs = functional.dequantize_4bit(packed, nested).numpy()
    assert np.allclose(theirs, dequantized(found, weight.shape)["nf4-double"], rtol=0, atol=1e-6 * np.abs(weight).max())
    return found


def dequantized(found: dict[str, np.ndarray], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The weight by scheme."""
    table = tables_of_the_paper()
    groups = np.repeat(found["nested_absmax"], 256)[: found["nested"].size]
    scales = table["dynamic"][found["nested"]] * groups + found["offset"]
    values = table["nf4"][found["nf4"]].reshape(-1, 64)
    return {
        "nf4": (values * found["absmax"][:, None]).reshape(shape),
        "nf4-double": (values * scales[:, None]).reshape(shape),
        "int8": found["int8"] * (found["SCB"][:, None] / np.float32(127)),
    }


def tables() -> dict[str, np.ndarray]:
    """Those of bitsandbytes."""
    from bitsandbytes import functional

    dynamic = functional.create_dynamic_map().numpy()
    return {"nf4": functional.get_4bit_type("nf4", device="cpu").numpy(), "dynamic": dynamic}


def tables_of_the_paper() -> dict[str, np.ndarray]:
    """Ours."""
    from jlora._src.quantized import DYNAMIC, NF4

    return {"nf4": np.asarray(NF4, np.float32), "dynamic": DYNAMIC}


def main() -> None:
    found = tables()
    for seed, (name, shape) in enumerate(CASES.items()):
        drawn = weight(name, shape, seed)
        found[f"{name}/weight"] = drawn
        found |= {f"{name}/{part}": value for part, value in computed(drawn.astype(np.float32)).items()}
    save_file(found, FILE)


if __name__ == "__main__":
    main()

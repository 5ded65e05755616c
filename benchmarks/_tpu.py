"""Programs compiled for TPUs that need not be there (libtpu), results that are kept in a file, and Markdown tables."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from train.compute.compiled import Compiled
from train.compute.topology import topology_devices

ROOT = Path(__file__).parents[1]
COUNTING = ("train/compute/compiled.py", "train/compute/hlo.py")
"""The code that all results depend on."""
RESULTS = Path(__file__).parent / "results"

slice_devices = functools.cache(topology_devices)
"""The devices of a TPU slice such as ``v5e:2x4``."""


def llama(width: int, mlp: int, layers: int, heads: int, head_dim: int, **others: Any) -> dict[str, Any]:
    """A config.json of Llama 3's form: 8 key heads, 128,256 tokens."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **others,
    }


LLAMAS = {
    "Llama 3.2 1B": llama(2048, 8192, 16, 32, 64, tie_word_embeddings=True),
    "Llama 3.1 8B": llama(4096, 14336, 32, 32, 128),
    "Llama 3.1 70B": llama(8192, 28672, 80, 64, 128),
}


def cost(fn: Callable[..., Any], *args: Any, places: Any, donate: tuple[int, ...] = ()) -> dict[str, Any]:
    """What ``fn`` costs one device by its compiler: cycles, bytes of temporary memory and of collectives; no cycles if
    the device lacks the memory.

    Args:
      args: shapes with shardings.
      places: shardings of the results.
      donate: as `jax.jit`'s ``donate_argnums``.
    """
    lowered = jax.jit(fn, out_shardings=places, donate_argnums=donate).lower(*args)
    begun = time.perf_counter()
    try:
        found = Compiled(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"cycles": None}
    seconds = round(time.perf_counter() - begun, 1)
    memory = {"temp_bytes": found.temp_bytes, "peak_bytes": found.peak_bytes}
    costs = {"cycles": found.cycles, **memory, "collectives": found.collectives, "kernels": found.kernels}
    return {**costs, "compile_seconds": seconds}


class Results:
    """Results by key, in a JSON file that is written after each: a stopped run continues where it was.

    A result is found again as long as the code that it depends on and the compiler stay the same.

    Args:
      file: is created.
      stale: use results of other code too, and compute none.
    """

    def __init__(self, file: Path, *, stale: bool = False):
        self._file, self._stale = file, stale
        self._found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, key: str, make: Callable[[], dict[str, Any]], *code: str) -> dict[str, Any] | None:
        """The result of ``make``, which depends on these folders and files; None if it is missing and not computed."""
        kept = self._found.get(key)
        if self._stale or kept is not None and kept["stamp"] == _stamp(code):
            return kept
        begun = time.perf_counter()
        self._found[key] = {**make(), "stamp": _stamp(code)}
        print(f"{key}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        self._file.parent.mkdir(exist_ok=True)
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(self._found.items())]
        draft = self._file.with_suffix(".draft")
        draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        draft.replace(self._file)
        return self._found[key]


@functools.cache
def _stamp(code: tuple[str, ...]) -> str:
    """Of the code, without its comments, and of the compiler."""
    digest = hashlib.sha256()
    for path in (*COUNTING, *code):
        files = sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
        for file in files:
            digest.update(ast.dump(ast.parse(file.read_text())).encode())
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    return " ".join([*versions, digest.hexdigest()[:12]])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(page: str, name: str, table: str) -> None:
    """Put a table into a page of docs/, between its comments ``<!-- name -->`` and ``<!-- end of name -->``."""
    file = ROOT / "docs" / page
    text, (start, end) = file.read_text(), (f"<!-- {name} -->\n", f"<!-- end of {name} -->")
    before, rest = text.split(start)
    file.write_text(f"{before}{start}{table}\n{end}{rest.split(end)[1]}")

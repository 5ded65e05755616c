"""Does the input side hide behind the step, and does its memory stay flat?

    python -m benchmarks.input [--rows 10000 1000000] [--rounds 5] [--steps 150] [--json FILE]

- large: runs of ``python -m train`` over generated sentences, of the smallest and of the largest number of rows, each
  with an empty cache and with a filled one: peak memory, and seconds to the first step. The network is a tiny encoder,
  the tokenizer a WordPiece one of 30,522 tokens, and an epoch is a few steps of a large batch.
- hidden: the trainer's time relative to the bare compiled step on batches in memory, with a filled cache, where
  tokenizing takes longer than the step; also with a step that only waits, as a host waits for an accelerator.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks._measure import Bar, table
from benchmarks.trainer import overhead
from jlora import models
from train.__main__ import ROOT, parse
from train.data.tables import Column, load
from train.job import make_job

MOST_MEMORY, MOST_START, MOST_OVERHEAD = 1.2, 1.2, 1.03
WORDS = "a film story plot with and of the actor scene fine great lovely warm poor dull awful cold".split()
CODE = """
import json, sys, time
began = time.time()
import train.loop.loop as loop
first = []
advance = loop._Loop.advance
def timed(self):
    advance(self)
    if not first:
        self.collect(0)
        first.append(time.time() - began)
loop._Loop.advance = timed
from train.__main__ import main
code = main(sys.argv[1:])
peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss begins with the parent's
print(json.dumps({"code": code, "first": first[0], "peak": peak, "all": time.time() - began}))
"""


def sentences(count: int, times: int = 1) -> Iterator[dict[str, Any]]:
    """Sentences of 4 to 19 words, or about so many times as many, all different from each other."""
    for i in range(count):
        words = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(times * (3 + i % 16))]
        yield {"sentence": " ".join([*words, str(i)]), "label": i % 2}


def write_sentences(file: Path, count: int, times: int = 1) -> None:
    with file.open("w") as stream:
        stream.writelines(f"{json.dumps(row)}\n" for row in sentences(count, times))


def write_model(folder: Path, tokenizer: Path, width: int) -> None:
    """A small encoder, with a tokenizer that takes its usual time."""
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": width}
    config = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 64, **sizes}
    model = models.build(config, task="features")
    params = {"params": model.init(jax.random.key(0), models.example_inputs(model))["params"]}
    models.save(folder, model, params)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def flags(folder: Path, model: str, rows: int, cache: Path, *more: str) -> list[str]:
    options = (
        "--data.limit None --task.labels None --task.max-length 32 --data.buckets 32 --lora.rank 2 --fit.epochs 1 "
        "--eval-batch-size 64 --compute.no-compilation-cache --fit.batch-size 2048"
    )
    return [
        "configs/sst2_minilm.py", "--model.path", str(folder / model), "--data.train", str(folder / f"{rows}.jsonl"),
        "--data.validation", str(folder / "validation.jsonl"), "--cache-dir", str(cache), *options.split(), *more,
    ]  # fmt: skip


def run(argv: list[str]) -> dict[str, Any]:
    """Seconds to the first step, and peak memory, of a run in a new process."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE, *argv], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    found = json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else {"code": 1}
    if found["code"]:
        raise SystemExit(f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
    return found


def idle_peak() -> int:
    """The peak memory of a process that imports the program and starts JAX, in bytes."""
    code = "import train.experiment, jax; jax.numpy.ones(3); import transformers.models.auto\n"
    code += "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024)"
    return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)


def large(folder: Path, sizes: list[int], rounds: int) -> list[Bar]:
    """Runs over the smallest and the largest number of rows, in turn."""
    for rows in sizes:
        write_sentences(folder / f"{rows}.jsonl", rows)
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for i in range(1 + rounds):
        for rows in sizes:
            argv = flags(folder, "tiny", rows, folder / f"cache{rows}", "--run-dir", str(folder / f"run{rows}-{i}"))
            found.setdefault((rows, "filled" if i else "empty"), []).append(run(argv))

    def of(rows: int, kind: str, name: str) -> float:
        return statistics.median(one[name] for one in found[rows, kind])

    lines = [
        [f"{rows:,}", kind, f"{of(*key, 'peak') / 2**20:,.0f}", f"{of(*key, 'first'):.2f}", f"{of(*key, 'all'):.1f}"]
        for key in sorted(found)
        for rows, kind in [key]
    ]
    print(table(["rows", "cache", "peak MiB", "first step s", "run s"], lines))
    print(f"a process that only imports: {idle_peak() / 2**20:,.0f} MiB\n")
    few, many = min(sizes), max(sizes)
    return [
        Bar("peak memory, filled cache", of(many, "filled", "peak") / of(few, "filled", "peak"), MOST_MEMORY),
        Bar("peak memory, empty cache", of(many, "empty", "peak") / of(few, "empty", "peak"), MOST_MEMORY),
        Bar("first step, filled cache", of(many, "filled", "first") / of(few, "filled", "first"), MOST_START),
    ]


def hidden(folder: Path, rounds: int, steps: int) -> list[Bar]:
    """The trainer over the bare step, where tokenizing takes longer than training: long texts, truncated."""
    rows = 8192
    write_sentences(folder / f"{rows}.jsonl", rows, times=20)
    argv = flags(folder, "small", rows, folder / "cache", "--fit.batch-size", "64")
    job = make_job(parse(argv), lambda: None)  # fills the cache
    texts = Column(load(job.config.data, job.config.cache_dir)["train"], "sentence")
    began = time.perf_counter()
    for start in range(0, rows, 64):
        job.task.tokens(texts[start : start + 64])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizing = (time.perf_counter() - began) / rows * 64
    bare, share, _ = overhead(argv, rounds, steps, folder)
    print(f"64 rows: {1000 * bare:.2f} ms to train on, in a bare step, and {1000 * tokenizing:.2f} ms to tokenize")
    bars = [Bar("trainer / bare step, from the cache", share, MOST_OVERHEAD)]
    argv = flags(folder, "tiny", rows, folder / "cache", "--fit.batch-size", "256")
    for seconds in (0.01, 0.03):
        _, share, _ = overhead(argv, rounds, steps, folder, elsewhere=seconds)
        bars.append(Bar(f"trainer / step of {1000 * seconds:.0f} ms elsewhere, 256 rows", share, MOST_OVERHEAD))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT.parent / "shared/models/minilm-l6")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], help="0 for the last part alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="input_") as scratch:
        folder = Path(scratch)
        write_model(folder / "tiny", args.tokenizer, width=8)
        write_model(folder / "small", args.tokenizer, width=96)
        write_sentences(folder / "validation.jsonl", 64)
        bars = hidden(folder, args.rounds, args.steps)
        bars += [] if args.rows == [0] else large(folder, args.rows, args.rounds)
    print(table(["bar", "measured", "limit", ""], [bar.row() for bar in bars]))
    if args.json:
        args.json.write_text(json.dumps({"bars": [bar.record() for bar in bars]}, indent=2))


if __name__ == "__main__":
    main()

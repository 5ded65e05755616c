"""How much does a language model lose that is fine-tuned on a quantized base?

    python -m benchmarks.quantized_quality CHECKPOINT TRAIN.jsonl [--rows 400] [--held-out 100] [--epochs 1]

Trains adapters of rank 16 on every linear layer on the first ROWS rows (questions and answers of at most
480 characters together) with the trainer's own step, and prints the loss of the held-out answers (the last rows of the
file), before and after training, against that of the same run on the checkpoint's own bfloat16 weights. All runs see
the same batches and draw the same factors, but for LoftQ's and LQ-LoRA's, which start from the quantization error.
Activations are float32, as on a CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from benchmarks._measure import Bar, table
from train.__main__ import parse
from train.compute.keys import random_key
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.step import init_state, make_step
from train.data.batches import batch_of, size, training_rows
from train.job import Job, make_job, start_adapters
from train.loop.evaluate import make_measure

SETTINGS = (
    "--task.messages None --task.prompt question --task.completion answer --task.no-pack --task.max-length 256 "
    "--data.buckets 128 160 192 --model.dtype float32 --lora.rank 16 --lora.alpha 32 --lora.dropout 0 "
    "--fit.batch-size 8 --learning-rate.lora 5e-4"
)
LONGEST = 480
"""The most characters of a question and its answer."""
MOST = 1.03
"""The largest ratio of held-out losses to bfloat16's."""

Start = Callable[[Job, Any], tuple[Any, Any]]
"""The base and the adapters that training starts from, given a job and the checkpoint's parameters."""


def plain(job: Job, params: Any, scheme: str | None = None) -> tuple[Any, Any]:
    """Fresh adapters on the checkpoint's weights, or on these quantized."""
    uses = jlora.trace(job.network.forward, params, job.task.inputs(batch_of(job.examples, np.arange(1), job.buckets)))
    base = params if scheme is None else jlora.quantize(params, scheme, uses)
    return base, start_adapters(job.config, job.network, base, job.plan)


def repaired(job: Job, params: Any, method: Any) -> tuple[Any, Any]:
    """The adapters make up for a part of the error of NF4."""
    return jlora.decompose(
        params, job.plan, method=method, quantizer=lambda weight: jlora.quantize_array(weight, "nf4")
    )


STARTS: dict[str, Start] = {
    "bfloat16": plain,
    "nf4": partial(plain, scheme="nf4"),
    "nf4, loftq": partial(repaired, method="loftq"),
    "nf4, lq": partial(repaired, method="lq"),
    "int8": partial(plain, scheme="int8"),
}


def losses(job: Job, start: Start) -> dict[str, float]:
    """The held-out loss before and after training, and the gigabytes of the base."""
    config, fit = job.config, job.config.fit
    steps = fit.epochs * (size(job.examples) // fit.batch_size)
    assert job.network.load is not None
    params = job.network.load(random_key(config.seed, "head"), None)
    base, adapters = start(job, params)
    del params
    tx = make_optimizer(fit)
    schedule = make_schedule(fit, config.learning_rate.lora, steps)
    step = jax.jit(make_step(job.network.forward, job.task, tx, schedule), donate_argnums=0)
    measure = make_measure(job.layout, job.network.forward, job.task, config.eval_batch_size, job.buckets)
    ((name, held_out),) = job.test.items()

    def held_out_loss(adapters: Any) -> float:
        return job.task.metrics(measure(base, adapters, held_out))["loss"]

    found = {"before": held_out_loss(adapters)}
    state, key = init_state(tx, adapters), random_key(config.seed, "dropout")
    for i in range(steps):
        rows = training_rows(size(job.examples), fit.batch_size, config.seed, i)
        state, metrics = step(state, base, batch_of(job.examples, rows, job.buckets), key)
        if i % 10 == 9:
            print(f"  step {i + 1} of {steps}  loss {float(metrics['loss']):.4f}", flush=True)
    memory = sum(leaf.nbytes for leaf in jlora.named_leaves(base)[0].values()) / 1e9
    return {**found, "after": held_out_loss(state.adapters), "base_gigabytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("rows_file", metavar="TRAIN.jsonl", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--starts", nargs="*", choices=STARTS, default=[*STARTS], help="with bfloat16 and nf4")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            line
            for line in args.rows_file.read_text(encoding="utf-8").splitlines()
            if sum(map(len, json.loads(line).values())) <= LONGEST
        ]
        files = {"train": lines[: args.rows], "validation": lines[-args.held_out :]}
        for name, rows in files.items():
            (Path(folder) / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        job = make_job(
            parse(
                [
                    "configs/instruct_llama.py", *SETTINGS.split(), "--model.path", args.checkpoint,
                    "--data.train", f"{folder}/train.jsonl", "--data.validation", f"{folder}/validation.jsonl",
                    "--fit.epochs", str(args.epochs),
                ]
            ),
            lambda: None,
        )  # fmt: skip
        for name in ("bfloat16", "nf4", *args.starts):
            if name not in found:
                print(name, flush=True)
                found[name] = losses(job, STARTS[name])
                if args.json:
                    args.json.write_text(json.dumps(found, indent=2) + "\n")
    best, nf4 = found["bfloat16"]["after"], found["nf4"]["after"]
    rows = [
        (
            name, f"{one['before']:.4f}", f"{one['after']:.4f}", f"{one['after'] / best:.4f}",
            f"{one['base_gigabytes']:.3f}",
        )
        for name, one in found.items()
    ]  # fmt: skip
    print(table(("base", "before", "after", "of bfloat16's", "GB"), rows))
    bars = [
        Bar("nf4 / bfloat16", nf4 / best, MOST),
        *(Bar(f"{name} / nf4", found[name]["after"] / nf4, 1.0) for name in ("nf4, loftq", "nf4, lq") if name in found),
    ]
    print(table(("held-out loss", "measured", "at most", ""), [bar.row() for bar in bars]))


if __name__ == "__main__":
    main()

"""Does a real run match PyTorch and peft in accuracy and step time, and do they load its exports?

    python -m benchmarks.sst2_minilm CHECKPOINT DATA [--seeds 0 1 2] [--rounds 30] [--only accuracy|time] [--json FILE]

CHECKPOINT is a folder with MiniLM-L6-H384 in BERT's layout; DATA has train.jsonl and validation.jsonl of SST-2. Needs
``pip install -e ".[interop]"``.

- accuracy: `configs/sst2_minilm.py` for every seed, as ``python -m train`` runs it: 16,000 sentences, one epoch.
- exports: the first seed's run is exported for peft and as a merged checkpoint; torch loads both, and the predictions
  of all validation sentences are compared.
- time: one training step of the same recipe on the same batches, in jlora and in PyTorch with peft, rounds interleaved;
  every batch padded to 64 tokens, then to its bucket, like the program. The ratio is the median of the ratios
  within each round; the shortest times are printed too. Use an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

from benchmarks._measure import Bar, interleave, ratio, table
from train.__main__ import ROOT, parse
from train.commands.export import export
from train.commands.predict import predict
from train.compute.keys import random_key
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.step import init_state, make_step
from train.data import tables as data
from train.data.batches import batch_of
from train.experiment import run
from train.job import encoded_tables, plan_of, start_adapters, uses_of
from train.networks.registry import make_network
from train.rundir.finished import open_run
from train.tasks.registry import make_task, resolved

LEAST_ACCURACY, MOST_TIME = 0.845, 0.95
STEPS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=("accuracy", "time"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    flags = [str(ROOT / "configs" / "sst2_minilm.py"), "--model.path", str(args.checkpoint)]
    flags += ["--data.train", str(args.data / "train.jsonl"), "--data.validation", str(args.data / "validation.jsonl")]

    found: dict[str, Any] = {}
    bars: list[Bar] = []
    if args.only != "time":
        with tempfile.TemporaryDirectory(prefix="sst2_minilm_") as runs:
            found["accuracy"], differing = accuracy(flags, args.seeds, Path(runs))
        mean = statistics.mean(found["accuracy"].values())
        print(f"\naccuracy by seed: {found['accuracy']}, mean {mean:.4f} (at least {LEAST_ACCURACY})")
        found |= {"mean": mean, "differing": differing}
        bars += [Bar(f"predictions that differ: {name}", count, 0) for name, count in differing.items()]
        bars += [Bar("1 - mean accuracy", 1 - mean, 1 - LEAST_ACCURACY)]
    if args.only != "accuracy":
        for name, fixed in (("64 tokens", True), ("its bucket", False)):
            times = step_times(flags, args.rounds, fixed)
            rows = [
                [who, f"{statistics.median(taken):.3f}", f"{min(taken):.3f}", f"{ratio(times, who, 'peft'):.2f}"]
                for who, taken in times.items()
            ]
            print(f"\npadded to {name}\n{table(['step', 'median s', 'shortest s', '/ peft'], rows)}")
            found[f"times, {name}"] = times
            bars.append(Bar(f"jlora / peft, padded to {name}", ratio(times, "jlora", "peft"), MOST_TIME))
    print(f"\n{table(['bar', 'measured', 'limit', ''], [bar.row() for bar in bars])}")
    if args.json:
        args.json.write_text(json.dumps(found | {"bars": [bar.record() for bar in bars]}, indent=2))


def accuracy(flags: list[str], seeds: list[int], runs: Path) -> tuple[dict[int, float], dict[str, int]]:
    """The accuracy of every seed, and the numbers of torch's differing predictions on the first seed's exports."""
    found = {}
    for seed in seeds:
        summary = run(parse([*flags, "--seed", str(seed), "--run-dir", str(runs / str(seed))]))
        found[seed] = round(summary["metrics"]["adapted"]["validation"]["accuracy"], 4)
    folder = runs / str(seeds[0])
    for to in ("peft", "hf"):
        export(folder, to)
    return found, exports(folder)


def exports(folder: Path) -> dict[str, int]:
    """By export, the number of validation sentences that torch labels differently from the run's own ``predict``."""
    from peft import PeftModel  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    opened = open_run(folder)
    config = opened.config
    file = data.load(config.data, config.cache_dir)["validation"]
    texts = data.column(file, "sentence", "task.text")
    with contextlib.redirect_stdout(io.StringIO()) as printed, tempfile.TemporaryDirectory() as scratch:
        table_file = Path(scratch) / "texts.jsonl"
        table_file.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
        predict(folder, file=table_file)
    expected = [line.split("\t")[1] for line in printed.getvalue().splitlines()]

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "hf")
    base = AutoModelForSequenceClassification.from_pretrained(str(opened.network.source), num_labels=2)
    torch_models = {
        "adapters opened by peft": PeftModel.from_pretrained(base, str(folder / "peft")),
        "merged, opened by transformers": AutoModelForSequenceClassification.from_pretrained(folder / "hf"),
    }
    labels = ("negative", "positive")
    return {
        name: sum(a != labels[b] for a, b in zip(expected, _torch_predictions(model, tokenizer, [*texts]), strict=True))
        for name, model in torch_models.items()
    }


def _torch_predictions(model: Any, tokenizer: Any, texts: list[str]) -> list[int]:
    model.eval()
    found: list[int] = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            part = tokenizer(
                texts[start : start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            found += model(**part).logits.argmax(-1).tolist()
    return found


def step_times(flags: list[str], rounds: int, fixed: bool) -> dict[str, list[float]]:
    """Seconds per step in every round: jlora and peft on the same batches, without and with the network's dropout."""
    length = ["--data.buckets", "64"] if fixed else []
    peers: dict[str, Callable[[], None]] = {}
    for name, dropout in (("", False), (", dropout", True)):
        config = parse([*flags, *length, "--model.dropout" if dropout else "--model.no-dropout"])
        batches, jlora_step = _jlora(config, fixed, rounds)
        peers[f"jlora{name}"] = _in_turn(batches, jlora_step)
        peers[f"peft{name}"] = _in_turn(batches, _peft(config, dropout))
    return interleave(peers, rounds)


def _in_turn(batches: list[Any], step: Callable[[Any], None]) -> Callable[[], None]:
    """A function that takes one step on the next batch, so that every peer sees the same batch in the same round."""
    turn = iter(batches)
    return lambda: step(next(turn))


def _jlora(config: Any, fixed: bool, rounds: int) -> tuple[list[Any], Callable[[Any], None]]:
    tables = data.load(config.data, config.cache_dir)
    config = resolved(config, tables)
    network = make_network(config)
    task = make_task(config, network)
    train, _ = encoded_tables(task, tables, config.cache_dir)
    buckets = (64,) if fixed else (16, 32, 48, 64)
    order = np.random.default_rng(0).permutation(16_000)
    batches = [batch_of(train[""], order[i * 32 : i * 32 + 32], buckets)
               for i in range(rounds + 1)]  # fmt: skip
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    plan = plan_of(config, shapes, uses_of(network, shapes, task.inputs(batches[0])))
    assert network.load is not None
    base = network.load(random_key(0, "head"), None)
    tx, schedule = make_optimizer(config.fit), make_schedule(config.fit, config.learning_rate.lora, STEPS)
    step = jax.jit(make_step(network.forward, task, tx, schedule), donate_argnums=0)
    key = random_key(0, "dropout")
    state = jax.jit(lambda base: init_state(tx, start_adapters(config, network, base, plan)))(base)
    for shape in {batch["input_ids"].shape: batch for batch in batches}.values():
        state, _ = step(state, base, shape, key)

    def one(batch: Any) -> None:
        nonlocal state
        state, metrics = step(state, base, batch, key)
        jax.block_until_ready(metrics)

    return batches, one


def _peft(config: Any, dropout: bool) -> Callable[[Any], None]:
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(config.model.path, num_labels=2)
    settings = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model: Any = get_peft_model(base, settings)
    model.train(dropout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)

    def one(batch: Any) -> None:
        inputs = {
            name: torch.from_numpy(batch[name]).long() for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        loss = model(**inputs, labels=torch.from_numpy(batch["label"]).long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()

    return one


if __name__ == "__main__":
    main()

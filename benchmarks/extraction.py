"""How much of a full fine-tune's gain do extracted adapters keep?

    python -m benchmarks.extraction CHECKPOINT DATA [--steps 60] [--ranks 32] [--limit 400] [--json FILE]

CHECKPOINT is a folder with MiniLM-L6-H384 in BERT's layout; DATA has train.jsonl and validation.jsonl of SST-2. All
weights are trained for some steps; then `models.extract` reads both checkpoints. The share of the gain is that of
the accuracy over the untrained network, whose new head is a guess: (extracted - base) / (tuned - base). Of the
leaves taken whole (norms, biases, the head) it is shown apart: the tuned network with the base's matrices and tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

import jlora
from jlora import models
from jlora.messages import table

LENGTH, BATCH, RATE = 32, 16, 1e-4
LEAST = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32])
    parser.add_argument("--limit", type=int, default=400, help="validation sentences")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options: Any = {"task": "sequence-classification", "labels": 2, "key": jax.random.key(0)}
    model, base = models.load(args.checkpoint, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.checkpoint)
    train = rows(args.data / "train.jsonl", tokenizer, BATCH * args.steps)
    validation = rows(args.data / "validation.jsonl", tokenizer, args.limit)
    tuned = fine_tuned(model, base, train, args.steps)
    accuracy = {"base": score(model, base, validation), "tuned": score(model, tuned, validation)}
    with tempfile.TemporaryDirectory(prefix="extraction_") as folder:
        models.save(Path(folder) / "tuned", model, tuned)
        for rank in args.ranks:
            found = models.extract(args.checkpoint, Path(folder) / "tuned", rank=rank)
            whole = {path: x for path, x in found.adapters.items() if not isinstance(x, jlora.LoraFactors)}
            accuracy["whole leaves alone"] = score(model, jlora.merge(base, whole), validation)
            accuracy[f"rank {rank}"] = score(model, jlora.merge(base, found.adapters), validation)
            print(f"rank {rank}: energy kept {float(found.kept.total):.1%}", flush=True)
    gain = accuracy["tuned"] - accuracy["base"]
    shares = {name: (x - accuracy["base"]) / gain for name, x in accuracy.items()}
    rows_shown = [(name, f"{x:.4f}", f"{shares[name]:.1%}") for name, x in accuracy.items()]
    print(table(("weights", "accuracy", "share of the gain"), rows_shown, right=(1, 2)))
    print(f"asked: at least {LEAST:.0%} at rank {args.ranks[0]}")
    if args.json:
        args.json.write_text(json.dumps({"accuracy": accuracy, "shares": shares}, indent=2))


def rows(file: Path, tokenizer: Any, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and mask ``[n, LENGTH]``, and labels."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    chosen = np.random.default_rng(0).permutation(len(lines))[:limit]
    texts = [lines[i]["sentence"] for i in chosen]
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    return found["input_ids"], found["attention_mask"], np.array([lines[i]["label"] for i in chosen])


def fine_tuned(model: Any, params: Any, data: tuple[np.ndarray, ...], steps: int) -> Any:
    """The parameters after ``steps`` of AdamW on all of them."""
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps), weight_decay=0.01)

    @jax.jit
    def step(params: Any, state: Any, ids: Any, mask: Any, labels: Any) -> Any:
        def loss_of(params: Any) -> Any:
            logits = model.apply(params, ids, mask)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for i in range(steps):
        params, state, loss = step(params, state, *(x[i * BATCH : (i + 1) * BATCH] for x in data))
        if i % 10 == 0:
            print(f"step {i}: loss {float(loss):.3f}", flush=True)
    return params


def score(model: Any, params: Any, data: tuple[np.ndarray, ...]) -> float:
    """The accuracy."""
    apply = jax.jit(model.apply)
    ids, mask, labels = data
    parts = np.array_split(np.arange(len(labels)), 8)
    guesses = [np.asarray(jnp.argmax(apply(params, ids[part], mask[part]), -1)) for part in parts]
    return float(np.mean(np.concatenate(guesses) == labels))


if __name__ == "__main__":
    main()

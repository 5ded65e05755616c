"""The whole story: a base learns upright digits, is frozen, and is adapted to digits that are turned and inverted.

What it shows on the way is LoRA's promise. The adapters are small, the merged model predicts what the adapted one
predicts, and the base is still there once they are detached.
"""

from __future__ import annotations

import time
from typing import Any

import flax.traverse_util
import jax

import jlora
from train import data, report, store
from train.base import EVERYTHING, base
from train.config import ConfigError, TrainConfig, validate, validate_for
from train.evaluate import accuracy, compare, make_predict
from train.loop import fit, random_key
from train.model import HEAD, Forward, Init, network

NEW_HEAD = jlora.LoraConfig(targets=(), train_also=(rf"^{HEAD}/",))


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, adapt, merge and detach as ``config`` says; print what happens and write the run directory.

    Returns:
      The summary, as written to ``summary.json``.

    Raises:
      ConfigError: if the configuration cannot be run.
    """
    started = time.perf_counter()
    validate(config)

    # The data: the same images in two domains.
    images = data.load(config.data.file, config.cache_dir)
    validate_for(config, data.size(images["train"]))
    domains = {"upright": config.data.upright, "shifted": config.data.shifted}
    train = {name: data.in_domain(images["train"], domain) for name, domain in domains.items()}
    test = {name: data.in_domain(images["test"], domain) for name, domain in domains.items()}

    # The model, and what of it will be adapted.
    init, forward = network(config.model)
    lora_config, uses, plan = _plan(config, init, forward, train["upright"])
    run_dir = store.make_run_dir(config)
    print(f"{config.name}, mode {config.mode}, seed {config.seed}\n\n{plan}\n")

    plain = make_predict(forward, config.eval_batch_size)
    attached = make_predict(jlora.lora(forward), config.eval_batch_size)

    def measure(tree: Any, *names: str) -> dict[str, float]:
        return {name: accuracy(attached(tree, test[name]), test[name]) for name in names}

    def log(record: dict[str, Any]) -> None:
        store.append_jsonl(run_dir / "metrics.jsonl", record)

    # The base, which stays as it is from here on.
    trained = base(forward, init, train["upright"], config, lambda tree: measure(tree, "upright"), log)
    print(f"base: {'taken from' if trained.cached else 'cached at'} {trained.path}")

    # The adapters, trained on the shifted domain.
    start = jax.jit(lambda key, params: jlora.init(key, params, lora_config, uses))
    adapters = start(random_key(config.seed, "adapters"), trained.params)
    if config.mode == "head":
        adapters = _new_head(adapters, jax.jit(init)(random_key(config.seed, "head")))
    adapters, records = fit(
        forward,
        trained.params,
        adapters,
        train["shifted"],
        config.fit,
        phase="fit",
        learning_rate=getattr(config.learning_rate, config.mode),
        seed=config.seed,
        eval_every=config.eval_every,
        evaluate=lambda tree: measure(tree, *domains),
        log=log,
    )
    merged = jax.jit(jlora.merge)(trained.params, adapters)

    # The files, and the figures.
    store.save_adapters(run_dir, adapters)
    store.save_tree(run_dir / "merged", merged)
    drawn = report.draw_curves(run_dir / "curves.png", [*trained.records, *records], list(domains))
    summary = {
        "name": config.name,
        "mode": config.mode,
        "seed": config.seed,
        **compare(plain, attached, trained.params, adapters, merged, test),
        "test_images": {name: data.size(examples) for name, examples in test.items()},
        "trainable": _count(adapters),
        "total": _count(trained.params),
        "base": {"path": str(trained.path), "cached": trained.cached},
        "run_dir": str(run_dir),
        "seconds": round(time.perf_counter() - started, 2),
    }
    store.write_json(run_dir / "summary.json", summary)
    print(f"\n{report.accuracy_table(summary)}\n\nwritten to {run_dir} in {summary['seconds']:.1f} s")
    if not drawn:
        print("curves.png needs matplotlib: pip install -e '.[plots]'")
    return summary


def _plan(
    config: TrainConfig, init: Init, forward: Forward, examples: data.Examples
) -> tuple[jlora.LoraConfig, dict[str, jlora.WeightUse], jlora.Plan]:
    """What the mode trains, how the model uses its weights, and the plan that follows.

    Shapes are all that this needs: what does not fit the model is refused before anything is trained.
    """
    lora_config = {"lora": config.lora, "full": EVERYTHING, "head": NEW_HEAD}[config.mode]
    params = jax.eval_shape(init, random_key(config.seed, "model"))
    uses = jlora.trace(forward, params, examples["image"][:1])
    try:
        return lora_config, uses, jlora.plan(params, lora_config, uses)
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error


def _new_head(adapters: dict[str, Any], random_params: Any) -> dict[str, Any]:
    """The same paths with random values instead of the base's: a head that has learnt nothing."""
    fresh = flax.traverse_util.flatten_dict(random_params, sep="/")
    return {path: fresh[path] for path in adapters}


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

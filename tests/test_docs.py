"""Every page of docs/ is a program that runs and prints what it says; its commands, links and drawings exist."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.documents import ROOT, blocks, ran
from train.__main__ import COMMANDS, parse

START = "docs/index.md"
PAGES = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


def program(page: str) -> tuple[dict[str, Any], str]:
    """What a page's program defines and prints; where the page says so, it goes on from that of the Start page."""
    if page == "docs/models/other.md" and importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    return ran(page, START if "continues the program of [Start]" in (ROOT / page).read_text() else None)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("page", PROGRAMS)
def test_every_page_runs_and_prints_what_it_says(page: str) -> None:
    assert program(page)[1] == "".join(body for language, body in blocks(page) if language == "text")


@pytest.mark.parametrize("page", ["docs/models/linen.md", "docs/models/haiku.md"])
def test_recipes_lower_the_loss_and_serve_what_they_trained(page: str) -> None:
    n, _ = program(page)
    assert n["losses"][-1] < 0.8 * n["losses"][0]
    if page == "docs/models/linen.md":
        tuned = n["apply"](n["jlora"].attach(n["trained"], n["state"].params), n["x"])
        jax.tree.map(np.testing.assert_array_equal, n["restored"], n["state"])
    else:
        tree = n["jlora"].attach(n["params"], n["adapters"])
        tuned, _ = n["apply"](tree, n["state"], None, n["x"], False)
    np.testing.assert_allclose(n["served"], tuned, atol=1e-5)


def test_a_stateful_nnx_module_is_trained_and_served() -> None:
    n, _ = program("docs/models/nnx.md")
    assert n["losses"][-1] < 0.8 * n["losses"][0]
    module = n["nnx"].merge(n["definition"], n["jlora"].merge(n["weights"], n["trained_normed"]), n["rest"])
    assert int(module.dropout.rngs.count[...]) == 20
    module.eval()
    np.testing.assert_array_equal(n["served_normed"](n["x"]), module(n["x"]))
    assert not np.allclose(module.norm.mean[...], n["normed"].norm.mean[...])


def test_keras_serves_the_merged_weights() -> None:
    n, _ = program("docs/models/other.md")
    merged = n["keras_forward"](n["merged"], n["state"], n["x"])
    np.testing.assert_allclose(n["model"](n["x"]), merged, atol=1e-6)


def test_adapters_of_one_base_run_together() -> None:
    """Stacked ones answer as alone; merging is undone; the base comes back untouched."""
    n, _ = program("docs/guides/many.md")
    jlora, apply, params, tokens = n["jlora"], n["apply"], n["params"], n["tokens"]
    jax.tree.map(np.testing.assert_array_equal, n["base"], params)
    for i, adapters in enumerate((n["adapters"], n["other"])):
        alone = apply(jlora.attach(params, adapters), tokens)
        np.testing.assert_allclose(n["answers"][i], alone, atol=1e-4)
    restored = jax.tree.map(lambda x, y: np.abs(x - y).max(), n["restored"], params)
    assert max(jax.tree.leaves(restored)) < 1e-5


def test_each_row_of_a_batch_has_its_own_adapter() -> None:
    """By ids, in groups, along another axis, and by names."""
    n, _ = program("docs/serving.md")
    jlora, apply, params, tokens = n["jlora"], n["apply"], n["params"], n["tokens"]
    trees = [params, *(jlora.attach(params, one) for one in (n["adapters"], n["other"]))]
    ids = [1, 2, 0, 2]

    def alone(tokens: Any) -> Any:
        every = np.stack([apply(tree, tokens) for tree in trees])
        return every[ids, range(4)]

    for name in ("mixed", "served"):
        np.testing.assert_allclose(n[name], alone(tokens), atol=1e-4)
    np.testing.assert_allclose(n["turned"], alone((tokens + np.arange(6)) % 100), atol=1e-4)
    both = [apply(tree, tokens)[i] for i, tree in enumerate([*trees[1:], *trees[1:]])]
    np.testing.assert_allclose(n["grouped"][:4], np.stack(both), atol=1e-4)


def test_adapters_are_placed_as_their_weights_are() -> None:
    n, _ = program("docs/guides/memory.md")
    for one, place in zip(jax.tree.leaves(n["divided"]), jax.tree.leaves(n["own"]), strict=True):
        assert one.sharding == place
    assert n["mesh_step"]._cache_size() == 1
    for one, place in zip(jax.tree.leaves(n["state"]), jax.tree.leaves(n["state_places"]), strict=True):
        assert one.sharding == place
    for places in (n["own"], jax.tree.map(lambda x: x.sharding, n["placed"])):
        assert any("fsdp" in place.spec for place in jax.tree.leaves(places))


def test_what_is_saved_is_restored() -> None:
    n, _ = program("docs/guides/resume.md")
    for again in (n["restored"], n["from_flax"], n["resumed"]["adapters"]):
        jax.tree.map(np.testing.assert_array_equal, again, n["adapters"])
    logits = n["apply"](n["jlora"].attach(n["params"], n["adapters"]), n["tokens"])
    np.testing.assert_allclose(n["again"], logits, rtol=1e-5)


def test_checkpoints_go_out_and_come_back() -> None:
    n, _ = program("docs/huggingface.md")
    jax.tree.map(np.testing.assert_array_equal, n["loaded"], n["adapters"])
    assert n["answers"].shape == (2, 8)
    np.testing.assert_array_equal(n["answers"], n["plain"])  # fresh adapters
    merged = n["merged_model"].apply(n["merged"], n["tokens"])
    np.testing.assert_allclose(merged, n["model"].apply(n["params"], n["tokens"]), atol=0.1)


@pytest.mark.parametrize("dora", [False, True])
def test_one_optimizer_is_for_adapters_and_attached_trees(dora: bool) -> None:
    """LoRA+ as the page has it: B moves 16 times as far as A, what is frozen not at all."""
    n, _ = program("docs/models/optimizers.md")
    jlora, params = n["jlora"], n["params"]
    jax.tree.map(np.testing.assert_array_equal, n["base"], params)
    config = jlora.LoraConfig(rank=2, targets=("Dense_0/kernel",), train_also=("head",), use_dora=dora)
    adapters = jlora.init(jax.random.key(0), params, config, n["uses"])
    for tree in (adapters, jlora.attach(params, adapters)):
        names = jlora.labels(tree)
        updates, _ = n["lora_plus"].update(jax.tree.map(np.ones_like, tree), n["lora_plus"].init(tree), tree)
        far = {"frozen": 0.0, "B": 16e-3}
        for update, name in zip(*map(jax.tree.leaves, (updates, names)), strict=True):
            np.testing.assert_allclose(update, -far.get(name, 1e-3), rtol=1e-5)
        assert {"A", "B", "full"} | ({"magnitude"} if dora else set()) <= set(jax.tree.leaves(names))


def test_the_page_on_quantized_bases_runs() -> None:
    n, _ = program("docs/quantized.md")
    leaves = n["jlora"].named_leaves(n["base"])[0].values()
    assert sum(isinstance(x, n["jlora"].QuantizedArray) for x in leaves) > 3 and "nf4" in str(n["loss"])
    assert np.all(np.isfinite(n["logits"])) and set(n["small"]) == set(n["plan"])


def test_methods_keep_the_model_and_ship_without_the_residual() -> None:
    n, _ = program("docs/methods.md")
    logits = n["model"].apply(n["params"], n["tokens"])
    ga = n["apply"](n["jlora"].attach(n["shifted"], n["ga"]), n["tokens"])
    for found in (n["same"], n["shipped"], ga):
        np.testing.assert_allclose(found, logits, atol=1e-4)
    assert n["unchanged"]["params"]["Dense_0"]["kernel"] is n["params"]["params"]["Dense_0"]["kernel"]
    assert not any(np.any(f.a) for f in n["updates"].values() if isinstance(f, n["jlora"].LoraFactors))


def test_adapters_are_added_shortened_and_extracted() -> None:
    n, _ = program("docs/algebra.md")
    jlora, params, config = n["jlora"], n["params"], n["config"]
    first, second, exact, back = (jlora.merge(params, n[name]) for name in ("first", "adapters", "exact", "recovered"))
    mean = jax.tree.map(lambda p, x, y: p + 0.7 * (x - p) + 0.3 * (y - p), params, first, second)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), exact, mean)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, first)
    ranks = {f.rank for f in n["small"].values() if isinstance(f, jlora.LoraFactors)}
    assert ranks == {config.rank} and n["apart"] > 0 and abs(n["angle"]) <= 1 and set(n["sizes"]) == set(n["plan"])


def test_the_gradient_of_a_preference_has_the_adapters_structure() -> None:
    n, _ = program("docs/guides/preferences.md")
    assert jax.tree.structure(n["dpo_grads"]) == jax.tree.structure(n["adapters"])
    assert optax.tree.norm(n["dpo_grads"]) > 0


def commands(page: str) -> list[str]:
    """The trainings that a page starts, one a line, as they stand in its blocks."""
    text = "\n".join(re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))
    lines = [line.split("  #")[0] for line in text.replace("\\\n", " ").splitlines()]
    trainings = [line.split("python -m train", 1)[1] for line in lines if "python -m train" in line]
    found = [re.split(r"[;&>]", line)[0].strip("' ") for line in trainings]
    return [line for line in found if line.partition(" ")[0] not in {*COMMANDS} - {"show"}]


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_training_has_flags_that_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        assert parse(shlex.split(line.replace("CONFIG", "configs/digits.py").removeprefix("show"))), line


def test_the_drawings_are_those_of_their_script() -> None:
    drawings = runpy.run_path(str(ROOT / "docs" / "img" / "draw.py"))["drawings"]()
    assert {name: (ROOT / "docs" / "img" / name).read_text() for name in drawings} == drawings


def test_links_and_files_exist() -> None:
    for page in ("README.md", *PAGES):
        for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\":]+)", (ROOT / page).read_text()):
            assert (ROOT / Path(page).parent / target).exists(), f"{page}: {target}"

"""The README is true: every block of Python runs, in order, as one program; what it prints is what it says."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.peft_cases import needs_peft

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran() -> tuple[dict[str, Any], str]:
    """The names that the README's program defines, and what it prints."""
    names: dict[str, Any] = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for i, code in enumerate(body for language, body in BLOCKS if language == "python"):
            exec(compile(code, f"README.md, block {i + 1}", "exec"), names)
    return names, out.getvalue()


def test_every_block_runs_and_prints_what_it_says(ran: tuple[dict[str, Any], str]) -> None:
    printed = [body for language, body in BLOCKS if language == "text"]
    assert ran[1] == "".join(printed)


def test_its_claims_hold(ran: tuple[dict[str, Any], str]) -> None:
    """Fresh adapters changed nothing; training lowered the loss; merging, detaching and stacking agree."""
    n, _ = ran
    apply, attach, params, tokens = n["apply"], n["jlora"].attach, n["params"], n["tokens"]
    np.testing.assert_array_equal(n["logits"], n["model"].apply(params, tokens))
    assert n["loss"] < 0.1
    np.testing.assert_allclose(n["served"], apply(attach(params, n["adapters"]), tokens), atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, n["base"], params)
    np.testing.assert_allclose(n["answers"][0], n["served"], atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, n["again"], n["learnt"])
    assert max(n["report"].values()) < 1e-3
    with pytest.raises(n["peft"].PeftError, match=r"vLLM(.|\n)*classifier/dense/kernel' is trained whole"):
        n["peft"].save("nowhere", n["names"], n["weights"], n["learnt"], n["config"], uniform_rank=True)
    for one, place in zip(jax.tree.leaves(n["divided"]), jax.tree.leaves(n["own"]), strict=True):
        assert one.sharding == place
    assert any("fsdp" in place.spec for place in jax.tree.leaves(n["own"]))


@pytest.mark.parametrize("dora", [False, True])
def test_its_optimizer_is_for_adapters_and_attached_trees(ran: tuple[dict[str, Any], str], dora: bool) -> None:
    """LoRA+ as the README has it: B moves 16 times as far as A, what is frozen not at all."""
    n, _ = ran
    jlora, params = n["jlora"], n["params"]
    config = jlora.LoraConfig(rank=2, targets=("Dense_0/kernel",), train_also=("head",), use_dora=dora)
    adapters = jlora.init(jax.random.key(0), params, config, n["uses"])
    for tree in (adapters, jlora.attach(params, adapters)):
        names = jlora.labels(tree)
        updates, _ = n["lora_plus"].update(jax.tree.map(np.ones_like, tree), n["lora_plus"].init(tree), tree)
        far = {"frozen": 0.0, "B": 16e-3}
        for update, name in zip(*map(jax.tree.leaves, (updates, names)), strict=True):
            np.testing.assert_allclose(update, -far.get(name, 1e-3), rtol=1e-5)
        assert {"A", "B", "full"} | ({"magnitude"} if dora else set()) <= set(jax.tree.leaves(names))


@needs_peft
def test_pytorch_opens_what_it_says_that_it_opens(ran: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    """The saved adapter in `PeftModel`, the merged export in `AutoModel`, `peft`'s own adapter here: equal logits."""
    import peft as theirs
    import torch
    import transformers

    n, _ = ran
    folder, tokens = n["checkpoint"], n["tokens"]

    def logits(network: Any) -> Any:
        with torch.no_grad():
            return network.eval()(torch.tensor(np.asarray(tokens))).logits.numpy()

    def expected(adapters: Any) -> Any:
        return n["roberta"].apply(n["jlora"].merge(n["weights"], adapters), tokens)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = transformers.AutoModelForSequenceClassification
        base = auto.from_pretrained(folder)  # its head is a new one; that of the adapter takes its place
        moved = {path: jax.tree.map(lambda x: x + 0.1, value) for path, value in n["learnt"].items()}
        n["peft"].save(f"{folder}/adapter", n["names"], n["weights"], moved, n["config"], task_type="SEQ_CLS")
        adapted = theirs.PeftModel.from_pretrained(base, f"{folder}/adapter")
        np.testing.assert_allclose(logits(adapted), expected(moved), atol=1e-5)
        merged = auto.from_pretrained(f"{folder}/merged")
        np.testing.assert_allclose(logits(merged), expected(n["learnt"]), atol=1e-5)
        assert merged.config.id2label == {0: "bad", 1: "good"}

        config = theirs.LoraConfig(r=2, target_modules=["key"], init_lora_weights=False, task_type="SEQ_CLS")
        adapted = theirs.get_peft_model(auto.from_pretrained(folder), config)
        adapted.save_pretrained(str(tmp_path))
        loaded, _ = n["peft"].load(tmp_path, n["names"], n["weights"])
        np.testing.assert_allclose(logits(adapted), expected(loaded), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, n["jlora"].load(f"{folder}/orbax"), n["learnt"])


def test_there_are_exactly_two_set_up_commands() -> None:
    first = next(body for language, body in BLOCKS if language == "bash").strip().splitlines()
    commands = [line.split("#")[0].strip() for line in first]
    assert commands == ['pip install -e ".[train]" && python -m train', 'pip install -e ".[test]" && pytest']

"""`jlora.models.generate`: the tokens of transformers, the laws of sampling, and one compilation."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import models
from jlora.models import _generate
from tests.golden.make_decoders import CONFIGS, NEW, batch

GOLDEN = Path(__file__).parents[1] / "golden" / "decoders"
ROWS = np.asarray([0, 2])  # a full prompt, and one that is padded on the left


@functools.cache
def case(name: str) -> tuple[Any, Any, np.ndarray, np.ndarray, np.ndarray]:
    """Model, parameters, prompts, their mask, and the tokens that transformers makes."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids, mask = expected["input_ids"][ROWS], expected["attention_mask"][ROWS]
    return *models.load(GOLDEN / name), ids, mask, expected["greedy"]


def compiled() -> int:
    """How many programs `generate` has compiled."""
    program: Any = _generate._generate
    return program._cache_size()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_most_probable_tokens_are_those_of_transformers(name: str) -> None:
    """With a full prompt and one padded on the left."""
    model, params, ids, mask, greedy = case(name)
    tokens = models.generate(model, params, ids, mask, max_new_tokens=NEW, eos_token_id=None)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, greedy)


@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_a_row_ends_at_an_end_token_as_in_transformers(name: str) -> None:
    """After it there is padding, and nothing more is computed when all rows have ended."""
    model, params, ids, mask, greedy = case(name)
    ends = [int(greedy[0, 2]), int(greedy[1, 1])]

    def expect(ends: list[int]) -> np.ndarray:
        found = np.zeros_like(greedy)
        for row, tokens in enumerate(greedy):
            stop = next((i for i, t in enumerate(tokens) if t in ends), NEW - 1)
            found[row, : stop + 1] = tokens[: stop + 1]
        return found

    for some in (ends[:1], ends):
        found = models.generate(model, params, ids, mask, max_new_tokens=NEW, eos_token_id=some, pad_token_id=0)
        np.testing.assert_array_equal(found, expect(some))

    torch = pytest.importorskip("torch", reason="compares with transformers")
    import transformers

    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    out = theirs.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=ends,
        pad_token_id=0,
    )[:, ids.shape[1] :].numpy()
    np.testing.assert_array_equal(expect(ends)[:, : out.shape[1]], out)


def test_an_end_token_fills_the_rest_by_default() -> None:
    """Without a padding token the first end token pads."""
    model, params, ids, mask, greedy = case("llama2")
    end = int(greedy[0, 0])
    tokens = models.generate(model, params, ids, mask, max_new_tokens=NEW, eos_token_id=end)
    assert (np.asarray(tokens[0]) == end).all()


def checkpoint(name: str, folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    """A copy of a golden checkpoint with other attributes; None removes one."""
    shutil.copytree(GOLDEN / name, folder)
    stated = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({n: v for n, v in stated.items() if v is not None}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_a_row_ends_at_the_model_s_own_end_tokens(name: str, tmp_path: Path) -> None:
    """Those of generation_config.json, else of config.json, as in transformers; None, or none stated, ends nowhere."""
    _, _, ids, mask, greedy = case(name)
    first, second = int(greedy[0, 2]), int(greedy[1, 1])
    stated: dict[str, tuple[dict[str, Any], dict[str, Any] | None, list[int]]] = {
        "config": ({"eos_token_id": first}, None, [first]),
        "configs": ({"eos_token_id": [second, first]}, None, [first, second]),
        "generation": ({"eos_token_id": first}, {"eos_token_id": [second, 1]}, [second, 1]),
        "unstated": ({"eos_token_id": None}, None, []),
    }
    for case_, (config, generation, ends) in stated.items():
        folder = checkpoint(name, tmp_path / case_, config, generation)
        model: Any
        model, params = models.load(folder)
        call = functools.partial(models.generate, model, params, ids, mask, max_new_tokens=NEW, pad_token_id=0)
        found = np.asarray(call())
        assert set(model.config.end_tokens) == set(ends), case_
        np.testing.assert_array_equal(found, call(eos_token_id=ends), case_)
        np.testing.assert_array_equal(call(eos_token_id=None), greedy, case_)
        assert (found != greedy).any() == bool(ends), case_
        if not torch_is_there():
            continue
        import torch
        import transformers

        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        options: Any = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
        out = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)[:, ids.shape[1] :]
        np.testing.assert_array_equal(found[:, : out.shape[1]], out.numpy(), case_)

    # Of a generation_config.json without end tokens transformers takes none; here config.json's stay.
    model, _ = models.load(checkpoint(name, tmp_path / "elsewhere", {"eos_token_id": first}, {"temperature": 1.0}))
    assert model.config.end_tokens == (first,)
    assert models.build({**json.loads(model.config.hf), "eos_token_id": 7}, task="causal-lm").config.end_tokens == (7,)
    for wrong in ("</s>", [1, None], 2.5, True):
        model = models.build(checkpoint(name, tmp_path / f"{wrong}"[:9], {}, {"eos_token_id": wrong}))
        with pytest.raises(models.ModelError, match=r"generation_config.json: eos_token_id = .*; expected a token"):
            models.generate(model, params, ids, mask, max_new_tokens=1)


def torch_is_there() -> bool:
    return importlib.util.find_spec("torch") is not None


def test_padding_takes_no_position() -> None:
    """A prompt of 9 tokens and 23 new ones fill 32 positions, whatever the padding."""
    model, params, ids, mask, _ = case("gpt2")
    assert model.config.max_length == 32 and mask[1].sum() == 9
    call = functools.partial(models.generate, model, params, max_new_tokens=23, eos_token_id=None)
    narrow = call(ids[1:, 3:], mask[1:, 3:])
    wide = [np.pad(x[1:], ((0, 0), (20, 0))) for x in (ids, mask)]
    np.testing.assert_array_equal(call(*wide), narrow)
    with pytest.raises(models.ModelError, match="12 prompt and 23 new tokens; .* has 32 positions"):
        call(ids, mask)


def test_a_second_call_compiles_nothing() -> None:
    """Other tokens, temperatures, bounds, keys and end tokens: the same program."""
    model, params, ids, mask, _ = case("llama2")

    def draw(seed: int, temperature: float, top_p: float, end: int) -> Any:
        options: Any = {"temperature": temperature, "top_p": top_p, "eos_token_id": end, "pad_token_id": seed}
        return models.generate(model, params, ids, mask, max_new_tokens=NEW, key=jax.random.key(seed), **options)

    first, before = draw(0, 1.0, 1.0, 2), compiled()
    assert (np.asarray(first) != np.asarray(draw(1, 1.0, 1.0, 2))).any()
    np.testing.assert_array_equal(first, draw(0, 1.0, 1.0, 2))
    draw(3, 0.5, 0.9, 4)
    assert compiled() == before


def test_a_small_bound_or_temperature_is_greedy() -> None:
    """Only the most probable token is left."""
    model, params, ids, mask, greedy = case("llama2")
    settings: list[Any] = [{"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-4, "top_p": 1.0}]
    for options in settings:
        options |= {"max_new_tokens": NEW, "key": jax.random.key(0), "eos_token_id": None}
        found = models.generate(model, params, ids, mask, **options)
        np.testing.assert_array_equal(found, greedy)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.75), (2.0, 0.6)])
def test_tokens_are_drawn_from_the_tempered_and_cut_distribution(temperature: float, top_p: float) -> None:
    """Temperature first, then the fewest most probable tokens that reach ``top_p``, renormalized."""
    logits = np.log(np.asarray([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))
    heat = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-heat)
    kept = order[: np.searchsorted(np.cumsum(heat[order]), top_p - 1e-6) + 1]
    expected = np.zeros(5)
    expected[kept] = heat[kept] / heat[kept].sum()

    sampling = _generate.Sampling(jnp.float32(temperature), jnp.float32(top_p))
    count = 20_000
    drawn = _generate._sample(jax.random.key(1), jnp.broadcast_to(logits, (count, 5)), sampling)
    found = np.bincount(np.asarray(drawn), minlength=5) / count
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / count**0.5)


def test_an_adapted_model_generates_as_the_merged_one() -> None:
    """With ``apply=jlora.lora(model.apply)``; other adapters compile nothing, nor does the same version of the model
    again; without it the error says what to do."""
    model, params, ids, mask, greedy = case("llama2")
    uses = jlora.trace(model.apply, params, ids)
    fresh: Any = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=2, alpha=4), uses)
    drawn = {p: dataclasses.replace(f, b=jax.random.normal(jax.random.key(1), f.b.shape)) for p, f in fresh.items()}
    apply = jlora.lora(model.apply, materialize="error")
    options: Any = {"max_new_tokens": NEW, "eos_token_id": None}
    call = functools.partial(models.generate, model, input_ids=ids, attention_mask=mask, **options)
    np.testing.assert_array_equal(call(params=jlora.attach(params, fresh), apply=apply), greedy)
    before = compiled()
    tokens = call(params=jlora.attach(params, drawn), apply=jlora.lora(model.apply, materialize="error"))
    assert compiled() == before
    np.testing.assert_array_equal(tokens, call(params=jlora.merge(params, drawn)))
    assert (np.asarray(tokens) != greedy).any()
    with pytest.raises(TypeError, match="jlora.lora"):
        call(params=jlora.attach(params, fresh))


def test_each_row_has_its_own_adapters() -> None:
    """Mixed adapters, the base among them, give the tokens of each prompt alone; other ids compile nothing."""
    model, params, ids, mask, _ = case("llama2")
    uses = jlora.trace(model.apply, params, ids)

    def drawn(seed: int) -> Any:
        config = jlora.LoraConfig(rank=seed + 1, alpha=4)
        fresh: Any = jlora.init(jax.random.key(seed), params, config, uses)
        key = jax.random.key(seed)
        return {p: dataclasses.replace(f, b=jax.random.normal(key, f.b.shape) / 4) for p, f in fresh.items()}

    stacked = jlora.stack([drawn(seed) for seed in range(2)])
    every = [params, *(jlora.attach(params, one) for one in jlora.unstack(stacked))]
    rows = np.array([0, 1, 1, 0, 1])
    apply = jlora.lora(model.apply, materialize="error")
    call = functools.partial(models.generate, model, apply=apply, max_new_tokens=3, eos_token_id=None)
    alone = {
        (i, row): np.asarray(call(every[i + 1], ids[row : row + 1], mask[row : row + 1]))[0]
        for i in (-1, 0, 1)
        for row in (0, 1)
    }
    assert not np.array_equal(alone[0, 0], alone[1, 0])
    counts = set()
    for choice in ([0, 1, -1, -1, 1], [1, 1, 0, 1, 0]):
        found = call(jlora.attach(params, jlora.select(stacked, choice)), ids[rows], mask[rows])
        np.testing.assert_array_equal(found, [alone[i, row] for i, row in zip(choice, rows, strict=True)])
        counts.add(compiled())
    assert len(counts) == 1


def test_what_cannot_be_generated() -> None:
    """Each error says what was expected."""
    model, params, ids, mask, _ = case("gpt2")

    def refuse(error: type[Exception], match: str, mask: Any = mask, ids: Any = ids, **options: Any) -> None:
        with pytest.raises(error, match=match):
            models.generate(model, params, ids, mask, **{"max_new_tokens": 2, **options})

    wrong, right = batch(0)
    refuse(models.ModelError, r"prompts \[1\] have padding after a token.*padding_side", mask=right, ids=wrong)
    refuse(models.ModelError, r"prompts \[0\] are all padding", mask=np.zeros_like(mask) | (np.arange(2) == 1)[:, None])
    refuse(models.ModelError, r"temperature = -1", temperature=-1)
    refuse(models.ModelError, r"top_p = 0", top_p=0.0)
    refuse(models.ModelError, r"top_p = 1.5", top_p=1.5)
    refuse(models.ModelError, r"pass key=", temperature=1.0)
    refuse(models.ModelError, r"max_new_tokens = 0", max_new_tokens=0)
    refuse(models.ModelError, r"expected both", mask=mask[:1])
    refuse(models.ModelError, r"12 prompt and 21 new tokens; .* has 32 positions", max_new_tokens=21)
    size = model.config.vocab_size
    refuse(models.ModelError, rf"holds \[-1, {size}\]; expected tokens from 0 to", ids=ids * 0 + [size, -1] * 6)
    bare, _ = models.load(GOLDEN / "gpt2", task="features")
    with pytest.raises(models.ModelError, match="GPT2 has no logits of the next token"):
        models.generate(bare, params, ids, max_new_tokens=2)

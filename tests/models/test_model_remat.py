"""Rematerialization: the same gradients with less memory."""

from __future__ import annotations

from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora import models
from tests.messages import expect, message
from tests.small_checkpoints import BERT, VIT
from tests.tiny import DECODER

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
GPT2 = {"model_type": "gpt2", "vocab_size": 24, "n_embd": 16, "n_head": 2, "n_positions": 64, "n_layer": 6}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**BERT, **DROPOUT, "max_position_embeddings": 64},
    "gpt2": {**GPT2, "architectures": ["GPT2LMHeadModel"]},
    "llama": {**DECODER, "attention_dropout": 0.3, "num_hidden_layers": 6, "architectures": ["LlamaForCausalLM"]},
    "vit": {**VIT, **DROPOUT, "num_hidden_layers": 2, "image_size": 24, "architectures": ["ViTForImageClassification"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_gradient_for_less_memory(name: str) -> None:
    """With adapters and dropout: rematerialization changes no gradient, and keeps less the more it recomputes."""
    model = models.build(FAMILIES[name])
    params = {"params": model.init(jax.random.key(0), models.example_inputs(model))["params"]}
    inputs = models.example_inputs(model, (8, 36))
    config = jlora.LoraConfig(rank=2, alpha=4)
    adapters = jlora.init(jax.random.key(1), params, config, jlora.trace(model.apply, params, inputs))

    def measured(remat: Any) -> tuple[Any, int, int]:
        """The gradient, the bytes that its backward pass keeps, and the temporary memory of the program."""
        network = models.build(FAMILIES[name], remat=remat)
        assert network == model.clone(remat=remat)
        assert jax.tree.structure(models.abstract(network)) == jax.tree.structure(params)
        apply = jlora.lora(network.apply, materialize="error")

        def loss(adapters: Any, key: Any) -> Any:
            out: Any = apply(jlora.attach(params, adapters), inputs, deterministic=False, rngs={"dropout": key})
            return jnp.mean(jnp.sin(3 * out))

        key = jax.random.key(2)
        kept = jax.eval_shape(lambda a: jax.vjp(lambda a: loss(a, key), a)[1], adapters)
        compiled = jax.jit(jax.grad(loss)).lower(adapters, key).compile()
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
        memory: Any = compiled.memory_analysis()
        return compiled(adapters, key), size, memory.temp_size_in_bytes

    found = {remat: measured(remat) for remat in get_args(models.Remat)}
    for gradient, *_ in found.values():
        chex.assert_trees_all_close(gradient, found["none"][0], rtol=1e-4, atol=1e-6)
    full, dots, none = (found[remat][1:] for remat in ("full", "dots", "none"))
    assert full[0] < dots[0] < none[0]
    if name in ("gpt2", "llama"):  # XLA:CPU computes what is not scanned again too early to free anything.
        assert full[1] < dots[1] < none[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_policy_is_refused(name: str) -> None:
    model = models.build(FAMILIES[name]).clone(remat=True)
    expect(message(models.ModelError, lambda: models.abstract(model)), "remat = True; expected 'none'", "'full'")

"""How long is a LoRA step of a 1B Llama on a GPU?

    python -m benchmarks.gpu_step [--size 1b] [--part flash torch members plain remat forms] [--rounds 12] [--json FILE]

A decoder of Llama 3.2 1B's shape with random bfloat16 weights (16 layers, scanned; rank 16 on every linear) steps
on 8 rows of 1,024 tokens with AdamW:

- full: full fine-tuning;
- by hand: LoRA as plain ``x@W + s·(x@a)@b``, differentiated by JAX;
- jlora: the model untouched;
- limit: the forward pass and the activation gradient of the bare model, without training.

Each part runs in a separate process, which isolates its memory and failures:

- ``flash``: cuDNN's attention;
- ``torch``: the same shape in transformers, in full and with peft (eager and compiled), if installed;
- ``members``: 16 adapters, each with its own row of 512 tokens, in one program (`jax.vmap`) and one after the other;
- ``plain``: attention compiled by XLA;
- ``remat``: cuDNN's attention, each layer recomputed in the backward pass;
- ``forms``: other ways to write the adapted products by hand.

Rounds are interleaved within a part; times are medians. MFU counts a step's required FLOPs: no recomputation, and
no gradient of a frozen weight. Memory is the compiler's plan for the step, arguments included; PyTorch's is the
peak of its allocator. Needs only jax, jlora and, for ``torch``, torch, transformers and peft. All parts together take
about 7 minutes on an H200.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks import _measure
from train.compute import flops

PARTS = ("flash", "torch", "members", "plain", "remat", "forms")
MEMBERS = 16
SCALE = 2.0
Tree = Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, of its batch, and of its adapters."""

    vocabulary: int = 128256
    width: int = 2048
    mlp: int = 8192
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    rows: int = 8
    tokens: int = 1024
    rank: int = 16

    def kernels(self) -> dict[str, tuple[int, int]]:
        """``{linear: (inputs, outputs)}`` of a layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.width, queries),
            "k": (self.width, keys),
            "v": (self.width, keys),
            "o": (queries, self.width),
            "gate": (self.width, self.mlp),
            "up": (self.width, self.mlp),
            "down": (self.mlp, self.width),
        }


SIZES = {"1b": Shape(), "toy": Shape(256, 64, 128, 2, 4, 2, 16, rows=2, tokens=32, rank=4)}


def make_params(shape: Shape) -> Tree:
    """Random bfloat16 weights: ``embed``, ``norm``, and the stacked ``layers``."""

    def make(key: jax.Array) -> Tree:
        keys = jax.random.split(key, 8)
        kernels = {
            name: jax.random.normal(k, (shape.layers, *size), jnp.bfloat16) / size[0] ** 0.5
            for k, (name, size) in zip(keys, shape.kernels().items(), strict=False)
        }
        norms = {name: jnp.ones((shape.layers, shape.width), jnp.bfloat16) for name in ("norm_0", "norm_1")}
        embed = jax.random.normal(keys[7], (shape.vocabulary, shape.width), jnp.bfloat16) / shape.width**0.5
        return {"embed": embed, "norm": jnp.ones(shape.width, jnp.bfloat16), "layers": kernels | norms}

    return jax.jit(make)(jax.random.key(0))


def bare(layer: Tree, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
    """The products of ``x`` with some kernels of a layer without LoRA."""
    return [x @ layer[name] for name in names]


def by_hand(layer: Tree, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
    """The same with LoRA written out, for JAX to differentiate."""
    factors = [layer["factors"][name] for name in names]
    return [x @ layer[n] + SCALE * _low_rank(x, *pair) for n, pair in zip(names, factors, strict=True)]


def scaled_hidden(layer: Tree, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
    """As `by_hand`, with the scale on the rank-sized product, so that XLA may fuse the sum into the second one."""
    factors = [layer["factors"][name] for name in names]
    return [x @ layer[n] + _low_rank(x, SCALE * a, b) for n, (a, b) in zip(names, factors, strict=True)]


def shared_input(layer: Tree, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
    """As `scaled_hidden`, with one first product for all kernels that read ``x``."""
    a, b = zip(*(layer["factors"][name] for name in names), strict=True)
    hidden = jnp.split(x @ (SCALE * jnp.concatenate(a, -1)).astype(x.dtype), len(names), -1)
    return [x @ layer[n] + h @ b_.astype(x.dtype) for n, h, b_ in zip(names, hidden, b, strict=True)]


def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


BY_HAND = {"by hand": by_hand, "scale on x·A": scaled_hidden, "one x·A for q, k, v and gate, up": shared_input}


def decode(
    params: Tree, x: jax.Array, *, shape: Shape, attention: str = "xla", remat: bool = False, linears: Any = bare
) -> jax.Array:
    """Hidden states ``[rows, tokens, width]`` of embedded tokens ``x``."""
    angles = jnp.arange(x.shape[1])[:, None] * 5e5 ** (-jnp.arange(0, shape.head_dim, 2) / shape.head_dim)
    cos, sin = (fn(angles)[:, None].astype(x.dtype) for fn in (jnp.cos, jnp.sin))

    def rotated(x: jax.Array) -> jax.Array:
        left, right = jnp.split(x, 2, -1)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    def layer(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        h = _norm(w["norm_0"], x)
        q, k, v = (y.reshape(*h.shape[:2], -1, shape.head_dim) for y in linears(w, "qkv", h))
        heads = jax.nn.dot_product_attention(
            rotated(q), rotated(k), v, is_causal=True, implementation=cast(Any, attention)
        )
        x = x + linears(w, ["o"], heads.reshape(*h.shape[:2], -1))[0]
        gate, up = linears(w, ["gate", "up"], _norm(w["norm_1"], x))
        return x + linears(w, ["down"], jax.nn.silu(gate) * up)[0], None

    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params["layers"])
    return _norm(params["norm"], x)


def _norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def loss(params: Tree, tokens: jax.Array, x: jax.Array | None = None, **options: Any) -> jax.Array:
    """The mean cross-entropy of each next token; ``x`` replaces the embedded tokens, if given."""
    hidden = decode(params, params["embed"][tokens] if x is None else x, **options)
    logits = (hidden[:, :-1] @ params["embed"].T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_adapters(shape: Shape, params: Tree, tokens: jax.Array, keys: jax.Array) -> dict[str, Any]:
    """jlora's adapters of every linear, stacked, one per key; B is nonzero, so that no gradient vanishes."""
    config = jlora.LoraConfig(rank=shape.rank, alpha=SCALE * shape.rank)
    uses = jlora.trace(functools.partial(loss, shape=shape), params, tokens)

    def make(key: jax.Array, params: Tree) -> dict[str, Any]:
        fresh = jlora.init(key, params, config, uses)
        return {p: dataclasses.replace(f, b=0.01 * jax.random.normal(key, f.b.shape)) for p, f in fresh.items()}  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    return jax.jit(jax.vmap(make, (0, None)))(keys, params)


def _first(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[0], tree)


def losses(**options: Any) -> dict[str, Callable[[Any, Any, jax.Array], jax.Array]]:
    """For each variant: the loss as a function of (trainable, frozen, tokens)."""
    adapted = jlora.lora(functools.partial(loss, **options))

    def hand(linears: Any, factors: Any, params: Tree, tokens: jax.Array) -> jax.Array:
        layers = params["layers"] | {"factors": factors}
        return loss(params | {"layers": layers}, tokens, linears=linears, **options)

    return {
        "full": lambda params, _, tokens: loss(params, tokens, **options),
        **{name: functools.partial(hand, linears) for name, linears in BY_HAND.items()},
        "jlora": lambda adapters, params, tokens: adapted(jlora.attach(params, adapters), tokens),
    }


def update(loss_fn: Callable[..., jax.Array], optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """One step: ``(state, frozen, tokens) -> (state, loss)``."""

    def step(state: Any, frozen: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        trainable, moments = state
        value, grads = jax.value_and_grad(loss_fn)(trainable, frozen, tokens)
        updates, moments = optimizer.update(grads, moments, trainable)
        return (optax.apply_updates(trainable, updates), moments), value

    return step


@dataclasses.dataclass
class Case:
    """One compiled step with its state.

    Attributes:
      flops: the step's required FLOPs.
      memory: bytes planned by the compiler, arguments included.
      compile_seconds: the time to trace, lower and compile.
    """

    run: Callable[[], float]
    tokens: int
    flops: float
    memory: int
    compile_seconds: float


def planned_memory(compiled: Any) -> int:
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def make_case(step: Any, counted: Any, state: Any, frozen: Any, tokens: jax.Array) -> Case:
    """``step`` compiled, and a function that runs it once, blocks, and returns the loss. The state is donated."""
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, tokens).compile()
    seconds = time.perf_counter() - start
    holder = [state]

    def run() -> float:
        holder[0], value = jax.block_until_ready(compiled(holder[0], frozen, tokens))
        return float(jnp.mean(value))

    return Case(run, tokens.size, flops.count(counted, state, frozen, tokens), planned_memory(compiled), seconds)


def step_part(shape: Shape, names: tuple[str, ...], *, attention: str, remat: bool = False) -> dict[str, Case]:
    """Compiled steps of the variants in ``names``, and of the limit."""
    params, optimizer = make_params(shape), optax.adamw(1e-4)
    tokens = jax.random.randint(jax.random.key(2), (shape.rows, shape.tokens), 0, shape.vocabulary)
    adapters = _first(make_adapters(shape, params, tokens, jax.random.split(jax.random.key(1), 1)))
    factors = {path.split("/")[-1]: (f.a, f.b) for path, f in adapters.items()}
    options: dict[str, Any] = {"shape": shape, "attention": attention, "remat": remat}
    compiled, counted = losses(**options), losses(shape=shape)

    def limit(x: jax.Array, params: Tree, tokens: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        value, grad = jax.value_and_grad(lambda x: loss(params, tokens, x, **options))(x)
        return x + grad, value

    embedded = jax.jit(lambda e, t: e[t])(params["embed"], tokens)
    steps: dict[str, tuple[Any, Any, Any, Any]] = {
        "limit": (functools.partial(limit, **options), functools.partial(limit, shape=shape), embedded, params)
    }
    starts = {"full": (params, None), **dict.fromkeys(BY_HAND, (factors, params)), "jlora": (adapters, params)}
    for name in names:
        trainable, frozen = starts[name]
        trainable = jax.tree.map(jnp.copy, trainable)  # the step donates its state
        step, count = (update(fns[name], optimizer) for fns in (compiled, counted))
        steps[name] = (step, count, (trainable, optimizer.init(trainable)), frozen)
    return {name: make_case(step, count, state, frozen, tokens) for name, (step, count, state, frozen) in steps.items()}


def members_part(shape: Shape, attention: str) -> dict[str, Case]:
    """A step of ``MEMBERS`` adapters, each with its own row: one after the other, and all in one program."""
    shape = dataclasses.replace(shape, rows=1, tokens=min(512, shape.tokens))
    params, optimizer = make_params(shape), optax.adamw(1e-4)
    tokens = jax.random.randint(jax.random.key(2), (MEMBERS, 1, shape.tokens), 0, shape.vocabulary)
    stacked = make_adapters(shape, params, tokens[0], jax.random.split(jax.random.key(1), MEMBERS))
    each = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(MEMBERS)]
    fns = [losses(shape=shape, attention=implementation)["jlora"] for implementation in (attention, "xla")]
    single, counted = (update(fn, optimizer) for fn in fns)
    step, count = (jax.vmap(step, (0, None, 0)) for step in (single, counted))
    together = make_case(step, count, (stacked, jax.vmap(optimizer.init)(stacked)), params, tokens)

    start = time.perf_counter()
    states = [(a, optimizer.init(a)) for a in each]
    compiled = jax.jit(single, donate_argnums=0).lower(states[0], params, tokens[0]).compile()
    seconds = time.perf_counter() - start

    def one_by_one() -> float:
        values = []
        for i in range(MEMBERS):
            states[i], value = compiled(states[i], params, tokens[i])
            values.append(value)
        jax.block_until_ready(states)
        return float(np.mean(values))

    apart = Case(one_by_one, tokens.size, together.flops, planned_memory(compiled), seconds)
    return {"one after the other": apart, "in one program": together}


def torch_part(shape: Shape) -> dict[str, Case]:
    """transformers' Llama of this shape in bfloat16: full fine-tuning, and peft on every linear."""
    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False)
    tokens = torch.randint(0, shape.vocabulary, (shape.rows, shape.tokens), device=device)
    counted = losses(shape=shape)
    params = jax.eval_shape(lambda: make_params(shape))
    ours = jax.ShapeDtypeStruct((shape.rows, shape.tokens), jnp.int32)
    one = jax.ShapeDtypeStruct((1,), jax.random.key(0).dtype)
    adapters = jax.eval_shape(lambda p, t, k: _first(make_adapters(shape, p, t, k)), params, ours, one)
    needed = {"full": (params, None), "jlora": (adapters, params)}

    def step_flops(name: str) -> float:
        return flops.count(jax.grad(counted[name]), *needed[name], ours)

    def case(name: str, compiled: bool) -> Case:
        start = time.perf_counter()
        model: Any = transformers.LlamaForCausalLM(config)
        model = model.to(device, torch.bfloat16)
        if name == "jlora":
            lora = peft.LoraConfig(r=shape.rank, lora_alpha=int(SCALE * shape.rank), target_modules="all-linear")
            model = peft.get_peft_model(model, lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
        forward = torch.compile(model) if compiled else model

        def run() -> float:
            value = forward(input_ids=tokens, labels=tokens).loss
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            return value.item()

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            run()
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return Case(run, tokens.numel(), step_flops(name), memory, time.perf_counter() - start)

    cases = {"torch: full": case("full", False), "torch: peft": case("jlora", False)}
    if device == "cuda":
        try:
            cases["torch: peft, compiled"] = case("jlora", True)
        except Exception as error:  # noqa: BLE001 (report any compiler error, and keep the other cases)
            print(f"torch.compile: {type(error).__name__}: {str(error)[:300]}")
    return cases


def make_part(part: str, shape: Shape) -> dict[str, Case]:
    """The compiled cases of a part."""
    fast = "cudnn" if jax.default_backend() == "gpu" else "xla"
    match part:
        case "flash":
            return step_part(shape, ("full", "by hand", "jlora"), attention=fast)
        case "plain":
            return step_part(shape, ("full", "by hand", "jlora"), attention="xla")
        case "remat":
            return step_part(shape, ("by hand", "jlora"), attention=fast, remat=True)
        case "members":
            return members_part(shape, fast)
        case "forms":
            return step_part(shape, (*BY_HAND, "jlora"), attention=fast)
        case "torch":
            return torch_part(shape)
    raise ValueError(f"part {part!r}; expected one of {PARTS}")


def measure(part: str, shape: Shape, rounds: int) -> dict[str, dict[str, Any]]:
    """The measurements of a part, by case."""
    cases = make_part(part, shape)
    values: dict[str, list[float]] = {name: [] for name in cases}
    runs = {name: lambda name=name: values[name].append(cases[name].run()) for name in cases}
    times = _measure.interleave(runs, rounds)
    if {"by hand", "jlora"} <= set(cases):
        np.testing.assert_allclose(values["jlora"], values["by hand"], rtol=2e-2, err_msg=f"losses in {part}")
    peak = flops.peak(jax.devices()[0])
    figures = {}
    for name, case in cases.items():
        seconds = statistics.median(times[name])
        figures[name] = {
            "seconds": seconds,
            "spread": (min(times[name]), max(times[name])),
            "tokens_per_second": case.tokens / seconds,
            "mfu": None if peak is None else case.flops / seconds / peak,
            "flops": case.flops,
            "memory": case.memory,
            "compile_seconds": case.compile_seconds,
            "loss": values[name][-1],
        }
    return figures


def show(part: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of a part."""
    first = next(iter(figures.values()))["seconds"]
    rows = [
        (
            name,
            f"{1e3 * f['seconds']:.2f}",
            f"{f['seconds'] / first:.3f}",
            f"{f['tokens_per_second']:,.0f}",
            "-" if f["mfu"] is None else f"{f['mfu']:.3f}",
            f"{f['flops'] / 1e12:.3f}",
            f"{f['memory'] / 2**30:.2f}",
            f"{f['compile_seconds']:.1f}",
        )
        for name, f in figures.items()
    ]
    header = (part, "ms", "/ first", "tokens/s", "MFU", "TFLOP", "GiB", "compile s")
    return _measure.table(header, rows)


def main() -> None:
    """Run each part in a separate process, and print its results as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="1b")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="one line per part")
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    for part in args.part:
        if part == "torch" and not all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
            print("torch: not measured; it needs torch, transformers and peft")
        elif not args.here:
            command = [sys.executable, "-m", "benchmarks.gpu_step", "--here", "--size", args.size, "--part", part]
            command += ["--rounds", str(args.rounds), *(["--json", str(args.json)] if args.json else [])]
            small = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if part == "torch" else {}
            if (code := subprocess.run(command, env=os.environ | small).returncode) != 0:
                print(f"{part}: ended with code {code}", flush=True)
        else:
            start = time.perf_counter()
            figures = measure(part, SIZES[args.size], args.rounds)
            device = jax.devices()[0].device_kind
            print(f"\njax {jax.__version__}, {device}, {SIZES[args.size]}, {time.perf_counter() - start:.0f} s")
            print(show(part, figures), flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(
                        json.dumps({"part": part, "jax": jax.__version__, "device": device, "cases": figures}) + "\n"
                    )


if __name__ == "__main__":
    main()

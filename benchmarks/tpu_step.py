"""What does a LoRA step cost on a TPU, by the account of the TPU's own compiler?

    python -m benchmarks.tpu_step [--part product step mesh] [--quick] [--tables]

Compiles for slices that need not be there; needs libtpu (``pip install -e ".[tpu]"``, Linux). Cycles are the
compiler's estimates, without collectives: no times. They are the same on every machine.

- ``product``: one product, tokens × inputs × outputs, in bfloat16: bare, with the low-rank update in several forms, and
  as `jlora.lora` computes it. ``W + AB`` first is a bound, not an option: bfloat16 would round the update away.
- ``step``: a training step on one v5e chip with AdamW, adapters on every linear layer. The limit is the bare model's
  forward pass and activation gradient; "by hand" is `(x@a)@b` added to each linear layer of the same model, and
  differentiated by JAX.
- ``mesh``: the same on eight chips.

Every result is kept in ``results/tpu_step.json`` as soon as it is there, and compiled again only if its code or its
compiler changed. The tables are written into docs/speed.md. ``--quick`` prints one point of each part.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import _tpu
from jlora import models

FILE = _tpu.RESULTS / "tpu_step.json"
PARTS = ("product", "step", "mesh")
PRODUCTS = ((4096, 2048, 8192), (16384, 2048, 8192), (16384, 2048, 2048), (4096, 8192, 2048))
RANKS = (8, 16, 64)
REMATS: tuple[models.Remat, ...] = ("none", "dots", "full")
MESHES = ((8, 1), (2, 4))
OURS, MODELS = ("jlora/_src", "jlora/models"), ("jlora/models",)
"""The code that results depend on: with jlora, and without."""

ENCODER = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
GEMMA = {
    "model_type": "gemma",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 16384,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
NETWORKS = {
    "Llama 3.2 1B, 4 layers": _tpu.LLAMAS["Llama 3.2 1B"] | {"num_hidden_layers": 4},
    "the same, 2 layers, 32k vocabulary": _tpu.LLAMAS["Llama 3.2 1B"] | {"num_hidden_layers": 2, "vocab_size": 32768},
    "Gemma 2B, 2 layers, 32k vocabulary": GEMMA,
    "BERT base, 4 layers": ENCODER,
    "Llama 3.1 8B": _tpu.LLAMAS["Llama 3.1 8B"],
    "toy": _tpu.llama(64, 128, 2, 8, 16, vocab_size=256),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One step: a network, its batch, and how it is trained.

    Attributes:
      mesh: sizes of the axes fsdp and tensor.
      attention: the plain form is the same in all programs, and has an estimate; see `benchmarks.attention`.
    """

    network: str
    rows: int
    length: int
    remat: models.Remat
    rank: int = 16
    mesh: tuple[int, int] = (1, 1)
    attention: models.AttentionForm = "plain"

    def __str__(self) -> str:
        mesh = "" if self.mesh == (1, 1) else f", fsdp x tensor = {self.mesh[0]} x {self.mesh[1]}"
        rank = f", rank {self.rank}" if self.rank else ""
        return f"{self.network}, {self.rows}x{self.length} tokens, remat {self.remat}{rank}{mesh}"


LLAMA_4K = Point("Llama 3.2 1B, 4 layers", 4, 1024, "full")
STEPS = [
    *(dataclasses.replace(LLAMA_4K, remat=remat) for remat in ("full", "none", "dots")),
    Point("the same, 2 layers, 32k vocabulary", 16, 1024, "full"),
    *(dataclasses.replace(LLAMA_4K, rank=rank) for rank in (8, 64)),
    *(Point("BERT base, 4 layers", rows, 128, remat) for rows in (32, 128) for remat in REMATS),
    *(Point("Gemma 2B, 2 layers, 32k vocabulary", rows, 1024, remat) for rows in (4, 16) for remat in REMATS),
    *(Point("the same, 2 layers, 32k vocabulary", 16, 1024, remat) for remat in ("none", "dots")),
]
MESH_STEPS = [Point("Llama 3.2 1B, 4 layers", 8, 2048, "full", mesh=mesh) for mesh in MESHES]


# One product


def bare(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w


def two_products(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + (x @ a) @ b


def longer_contraction(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x @ a], 1) @ jnp.concatenate([w, b], 0)


def merged(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ (w + a @ b)


FORMS: dict[str, Callable[..., jax.Array]] = {
    "bare": bare,
    "two products and an add": two_products,
    "`[x, xA] @ [W; B]`": longer_contraction,
    "`W + AB` first": merged,
}


def product_cost(form: str, sizes: tuple[int, int, int], rank: int, device: Any) -> dict[str, Any]:
    """What the product of ``sizes``, tokens × inputs × outputs, costs in this form."""
    tokens, inputs, outputs = sizes
    place = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    x, w = (_shape(size, jnp.bfloat16, place) for size in ((tokens, inputs), (inputs, outputs)))
    if form == "jlora":
        adapters = _placed(_fresh({"w": w}, rank, lambda params, x: x @ params["w"], x), place)
        adapted = jlora.lora(lambda params, x: x @ params["w"])
        return _tpu.cost(lambda x, w, f: adapted(jlora.attach({"w": w}, f), x), x, w, adapters, places=place)
    factors = [_shape(size, jnp.float32, place) for size in ((inputs, rank), (rank, outputs))]

    def written(x: jax.Array, w: jax.Array, *factors: jax.Array) -> jax.Array:
        return FORMS[form](x, w, *(factor.astype(x.dtype) for factor in factors))

    return _tpu.cost(written, x, w, *factors, places=place)


def product_table(results: _tpu.Results, quick: bool) -> str:
    rows = []
    for sizes in PRODUCTS[: 1 if quick else None]:
        for rank in (16,) if quick else RANKS:
            cells = [" × ".join(map(str, sizes)), str(rank)]
            limit = 0
            for form in (*FORMS, "jlora"):
                key = f"product {sizes} {form}" + ("" if form == "bare" else f" rank {rank}")
                make = functools.partial(_on_v5e, product_cost, form, sizes, rank)
                cycles = (results.get(key, make, *(OURS if form == "jlora" else ())) or {}).get("cycles")
                limit = cycles if form == "bare" else limit
                cells.append(_against(cycles, limit, 1e3, 0))
            rows.append(cells)
    return _tpu.markdown(("kcycles: tokens × in × out", "rank", *FORMS, "**jlora**"), rows)


def _on_v5e(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args, _tpu.slice_devices("v5e:2x4")[0])


# A training step


def interceptor_of_limit(added: jax.Array) -> Any:
    """Adds to the output of the embedding, so that the gradient passes through the whole network."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        embeds = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
        return out + added if embeds and context.module.name in ("embed_tokens", "word_embeddings") else out

    return intercept


def written_out(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Adds the low-rank product of ``lora_a`` and ``lora_b``, which stand beside the kernel of a linear layer."""
    y, module = call(*args, **kwargs), context.module
    if not isinstance(module, nn.Dense) or not module.has_variable("params", "lora_a"):
        return y
    a, b = (module.get_variable("params", name).astype(y.dtype) for name in ("lora_a", "lora_b"))
    return y + (args[0].astype(y.dtype) @ a) @ b


class Steps:
    """The programs of a point: functions, and the shapes of their arguments with shardings."""

    def __init__(self, point: Point, devices: Sequence[Any], use_dora: bool = False):
        config = NETWORKS[point.network]
        encoder = config["model_type"] == "bert"
        task: Any = {"task": "sequence-classification", "labels": 2} if encoder else {"task": "causal-lm"}
        dtypes: Any = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.model: Any = models.build(config, **task, **dtypes, remat=point.remat, attention=point.attention)
        self._mesh = jax.make_mesh(
            (1, *point.mesh),
            ("data", "fsdp", "tensor"),
            axis_types=(AxisType.Auto,) * 3,
            devices=devices[: point.mesh[0] * point.mesh[1]],
        )
        self.whole, rows = NamedSharding(self._mesh, P()), NamedSharding(self._mesh, P(("data", "fsdp")))
        shapes = models.abstract(self.model)
        self._places = jlora.shardings(shapes, self._mesh, models.sharding_rules(self.model))
        self.params = _placed(shapes, self._places)
        self.tokens = _shape((point.rows, point.length), jnp.int32, rows)
        self.added = _shape((point.rows, point.length, config["hidden_size"]), jnp.bfloat16, rows)
        fresh = _fresh(shapes, point.rank, self.model.apply, self.tokens, use_dora=use_dora)
        self.adapters = _placed(fresh, jlora.adapter_shardings(fresh, self._places))
        self.rank = point.rank
        self.optimizer = optax.adamw(1e-4)

    def loss(self, apply: Callable[..., jax.Array], params: Any, tokens: jax.Array) -> jax.Array:
        """Of each next token, or of the two classes."""
        logits = apply(params, tokens).astype(jnp.float32)
        classes = logits.ndim == 2
        logits, labels = (logits, tokens[:, 0] % 2) if classes else (logits[:, :-1], tokens[:, 1:])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def limit(self, added: jax.Array, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The gradient of the embedding's output, and the loss."""

        def loss(added: jax.Array) -> jax.Array:
            with nn.intercept_methods(interceptor_of_limit(added)):
                return self.loss(self.model.apply, params, tokens)

        value, grad = jax.value_and_grad(loss)(added)
        return grad, value

    def jlora(self, state: Any, params: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        """A step of the adapters: new state, loss."""
        apply = jlora.lora(self.model.apply)
        return self._update(lambda adapters: self.loss(apply, jlora.attach(params, adapters), tokens), state)

    def by_hand(self, state: Any, params: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        """The same with the update written out."""

        def loss(factors: Any) -> jax.Array:
            with nn.intercept_methods(written_out):
                tree = unflatten_dict(flatten_dict(params) | factors)
                return self.loss(self.model.apply, tree, tokens)

        return self._update(loss, state)

    def _update(self, loss: Callable[[Any], jax.Array], state: Any) -> tuple[Any, jax.Array]:
        trained, moments = state
        value, grads = jax.value_and_grad(loss)(trained)
        updates, moments = self.optimizer.update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), value

    def factors(self) -> dict[tuple[str, ...], Any]:
        """``lora_a`` and ``lora_b`` beside each adapted kernel, split over the mesh like it."""
        kernels: dict[Any, Any] = flatten_dict(self.params)
        found, places = {}, cast(Any, flatten_dict(self._places))
        for path, kernel in kernels.items():
            if "/".join(path) in self.adapters:
                *lead, inputs, outputs = kernel.shape
                *own, left, right = (*places[path].spec, *[None] * (len(kernel.shape) - len(places[path].spec)))
                a, b = P(*own, left, None), P(*own, None, right)
                found[(*path[:-1], "lora_a")] = self._factor((*lead, inputs, self.rank), a)
                found[(*path[:-1], "lora_b")] = self._factor((*lead, self.rank, outputs), b)
        return found

    def _factor(self, shape: tuple[int, ...], spec: P) -> Any:
        return _shape(shape, jnp.float32, NamedSharding(self._mesh, spec))

    def state(self, trained: Any) -> Any:
        """With the optimizer's moments, which are placed like what they belong to."""
        moments: Any = jax.eval_shape(self.optimizer.init, trained)
        structure = jax.tree.structure(trained)
        places = jax.tree.map(lambda x: x.sharding, trained)

        def is_moment(part: Any) -> bool:
            return jax.tree.structure(part) == structure

        sharded = jax.tree.map(lambda part: places if is_moment(part) else self.whole, moments, is_leaf=is_moment)
        return trained, _placed(moments, sharded)

    def cost(self, program: str) -> dict[str, Any]:
        """What one of `limit`, `jlora` and `by_hand` costs."""
        if program == "limit":
            state, places = self.added, self.added.sharding
        else:
            state = self.state(self.adapters if program == "jlora" else self.factors())
            places = jax.tree.map(lambda x: x.sharding, state)
        args = state, self.params, self.tokens
        return _tpu.cost(getattr(self, program), *args, places=(places, self.whole), donate=(0,))


def step_cost(point: Point, program: str) -> dict[str, Any]:
    """What a program of a point costs on v5e."""
    return Steps(point, _tpu.slice_devices("v5e:2x4")).cost(program)


def step_table(results: _tpu.Results, points: Sequence[Point]) -> str:
    found = {point: tuple(one or {} for one in step_results(results, point)) for point in points}
    networks = list(NETWORKS)
    rows = []
    for point in sorted(points, key=lambda point: (networks.index(point.network), point.rows * point.length)):
        limit, by_hand, ours = found[point]
        if not any(found[point]):
            continue
        mesh = "" if point.mesh == (1, 1) else f", {point.mesh[0]} × {point.mesh[1]}"
        rows.append(
            [
                f"{point.network}, {point.rows}×{point.length}{mesh}",
                point.remat,
                str(point.rank),
                _against(limit.get("cycles"), 0, 1e6, 1),
                _against(by_hand.get("cycles"), limit.get("cycles"), 1e6, 1),
                _against(ours.get("cycles"), limit.get("cycles"), 1e6, 1),
                _against(limit.get("temp_bytes"), 0, 2**20, 0),
                _against(ours.get("temp_bytes"), limit.get("temp_bytes"), 2**20, 0),
            ]
        )
    header = ("Mcycles of a step", "remat", "rank", "limit", "by hand", "**jlora**", "limit: temp MiB", "jlora")
    return _tpu.markdown(header, rows)


def step_results(results: _tpu.Results, point: Point) -> Iterator[dict[str, Any] | None]:
    """Of the limit, by hand and jlora; the limit is the same for all ranks."""
    for program in ("limit", "by_hand", "jlora"):
        key = f"{program}: {point if program != 'limit' else dataclasses.replace(point, rank=0)}"
        code = OURS if program == "jlora" else MODELS
        yield results.get(key, functools.partial(step_cost, point, program), *code)


def _against(value: float | None, limit: float | None, unit: float, digits: int) -> str:
    """A value, and its ratio to the limit."""
    if not value:
        return "-"
    return f"{value / unit:,.{digits}f}" + (f" ({value / limit:.2f})" if limit and limit != value else "")


def _fresh(params: Any, rank: int, fn: Callable[..., Any], *args: Any, use_dora: bool = False) -> Any:
    """The shapes of fresh adapters on every linear layer."""
    config = jlora.LoraConfig(rank=rank, alpha=rank, use_dora=use_dora)
    plan = jlora.plan(params, config, jlora.trace(fn, params, *args))
    return jax.eval_shape(lambda params: jlora.init(jax.random.key(0), params, plan), params)


def _shape(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _placed(tree: Any, places: Any) -> Any:
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, tree)
    return jax.tree.map(lambda x, place: _shape(x.shape, x.dtype, place), tree, places)


def part_table(results: _tpu.Results, part: str, quick: bool = False) -> str:
    """The table of a part; computes what is missing."""
    if part == "product":
        return product_table(results, quick)
    points = STEPS if part == "step" else MESH_STEPS
    return step_table(results, points[: 1 if quick else None])


def main() -> None:
    """Compute what is missing, print the tables, and write them into their page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="one point of each part")
    parser.add_argument("--tables", action="store_true", help="use what is kept, and compile nothing")
    args = parser.parse_args()
    results = _tpu.Results(FILE, stale=args.tables)
    if not args.tables:
        _tpu.slice_devices("v5e:2x4")  # before anything is computed
    for part in args.part:
        table = part_table(results, part, args.quick)
        print(table, end="\n\n", flush=True)
        if not args.quick:
            _tpu.write_table("speed.md", f"TPU: {part}", table)


if __name__ == "__main__":
    main()

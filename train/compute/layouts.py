"""Device layouts of a step: one device (jit), copies (pmap), or a mesh with sharded weights.

A `Layout` places the base, the state and batches, and compiles pure functions. The step, the loop and the metrics are
the same for all layouts, up to rounding and, under pmap, dropout masks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import named_leaves
from train.compute.step import Step, TrainState
from train.config import ComputeConfig, ConfigError, TrainConfig, refuse
from train.data.batches import Batch

RowFunction: TypeAlias = Callable[[Any, Any, Any], dict[str, jax.Array]]
"""``fn(base, adapters, batch)``: arrays whose leading axis is the batch's rows."""

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
REPLICATED: jlora.ShardingRules = (("", P()),)


class Layout(Protocol):
    """Places the base, the state and batches, and compiles functions of them.

    Attributes:
      axis: the mapped axis that `train.compute.step.make_step` reduces over; None if XLA splits the batch.
      devices: the number of devices in use.
      parts: the number of parts of a batch's rows; the batch size is a multiple.
      ahead: the number of steps dispatched before the host waits for one.
      on_host: whether the devices are this host's own cores, so that work beside a step slows it down.
    """

    @property
    def axis(self) -> str | None: ...

    devices: int
    parts: int
    ahead: int
    on_host: bool

    def place_base(self, shapes: Any, load: Callable[[Any], Any]) -> Any:
        """The base on its devices: ``load(shardings)``, with a tree like ``shapes``, or None for one device of this
        process."""
        ...

    def make_state(self, make: Callable[[Any], TrainState], base: Any) -> TrainState:
        """``make(base)`` on its devices."""
        ...

    def place_batch(self, build: Callable[[slice], Batch], count: int) -> Any:
        """A batch of ``count`` rows. Each process builds its devices' rows."""
        ...

    def compile_step(self, step: Step, state: TrainState) -> Callable[..., Any]:
        """``step``, compiled for states sharded like ``state``. It donates its input state."""
        ...

    def compile_rows(self, fn: RowFunction) -> Callable[..., dict[str, np.ndarray]]:
        """``fn``, compiled; returns the results for all rows in every process."""
        ...

    def call(self, fn: Callable[..., Any], *trees: Any) -> Any:
        """Calls a pure function of placed trees, such as a merge of base and adapters."""
        ...

    def to_host(self, tree: Any) -> Any:
        """The full arrays in NumPy, in every process."""
        ...

    def to_disk(self, state: TrainState) -> TrainState:
        """The state in the form that orbax saves, from all processes together."""
        ...

    def from_disk(self, state: TrainState) -> TrainState:
        """The inverse of `to_disk`."""
        ...


def _ahead(devices: int) -> int:
    # On jax 0.10, several steps in flight on emulated devices deadlock, waiting for each other's threads.
    return 1 if devices > 1 and jax.default_backend() == "cpu" else 16


class Pmap:
    """Copies base and state to every device; each device computes its rows.

    Placed arrays have a leading axis of this process's devices. All functions share one axis name: it is part of the
    shardings, and a step would recompile for a state with another name.
    """

    axis = "devices"

    def __init__(self) -> None:
        self.devices = self.parts = jax.device_count()
        self.ahead, self.on_host = _ahead(self.devices), jax.default_backend() == "cpu"
        self._local = jax.local_device_count()

    def __str__(self) -> str:
        return f"pmap on {_all_devices()}"

    def place_base(self, shapes: Any, load: Callable[[Any], Any]) -> Any:
        return self._replicated(load(None))

    def make_state(self, make: Callable[[Any], TrainState], base: Any) -> TrainState:
        return self.call(make, base)

    def place_batch(self, build: Callable[[slice], Batch], count: int) -> Any:
        own = count // jax.process_count()
        rows = build(slice(own * jax.process_index(), own * (jax.process_index() + 1)))
        return {name: x.reshape(self._local, -1, *x.shape[1:]) for name, x in rows.items()}

    def compile_step(self, step: Step, state: TrainState) -> Callable[..., Any]:
        mapped = jax.pmap(step, self.axis, in_axes=(0, 0, 0, None), donate_argnums=0)

        def stepped(*args: Any) -> tuple[Any, Any]:
            state, metrics = mapped(*args)
            return state, jax.tree.map(lambda x: x.addressable_data(0), metrics)

        return stepped

    def compile_rows(self, fn: RowFunction) -> Callable[..., dict[str, np.ndarray]]:
        mapped = jax.pmap(fn, self.axis)

        def each(*args: Any) -> dict[str, np.ndarray]:
            own = {name: _local_rows(x) for name, x in mapped(*args).items()}
            return own if jax.process_count() == 1 else multihost_utils.process_allgather(own, tiled=True)

        return each

    def call(self, fn: Callable[..., Any], *trees: Any) -> Any:
        return jax.block_until_ready(jax.pmap(fn, self.axis)(*trees))

    def to_host(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: np.asarray(_first_copy(x)), tree)

    def to_disk(self, state: TrainState) -> TrainState:
        # orbax treats arrays on one process's devices as incomplete; host arrays it saves from the first process.
        return self.to_host(state)

    def from_disk(self, state: TrainState) -> TrainState:
        return self._replicated(state)

    def _replicated(self, tree: Any) -> Any:
        copy = jax.pmap(lambda _, x: x, self.axis, in_axes=(0, None))
        return jax.block_until_ready(copy(np.arange(self._local), tree))


def _first_copy(x: jax.Array) -> jax.Array:
    """One of the copies, read on its device; ``x[0]`` would gather from all devices."""
    return x.addressable_data(0)[0]


def _local_rows(x: jax.Array) -> np.ndarray:
    """[devices, rows, ...] to [devices * rows, ...]."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data)[0] for shard in shards])


class Mesh:
    """A mesh of one or more devices. Sharding rules place the weights; adapters follow their weights."""

    axis = None

    def __init__(self, config: ComputeConfig, rules: jlora.ShardingRules, devices: Sequence[Any] | None = None):
        """Place on ``devices``, by default all that are here; they may be those of a topology, which only compiles."""
        found = jax.devices() if devices is None else devices
        self._all = _described(found)
        sizes = {axis: getattr(config, axis) for axis in AXES}
        others = config.fsdp * config.tensor
        sizes["data"] = config.data or max(len(found) // others, 1)
        self.devices = math.prod(sizes.values())
        if self.devices > len(found) or config.data is None and len(found) % others:
            raise ConfigError(
                f"compute: a mesh of {' x '.join(f'{axis}={size}' for axis, size in sizes.items())} does not fit on "
                f"{self._all}; expected fsdp x tensor to divide them, or a product with data up to their number"
            )
        if self.devices < len(found) and jax.process_count() > 1:
            raise ConfigError(
                f"compute: a mesh of {self.devices} devices, out of {self._all}; expected all of them to "
                "be used: leave compute.data out"
            )
        self.parts = sizes["data"] * sizes["fsdp"]
        self.ahead, self.on_host = _ahead(self.devices), found[0].platform == "cpu"
        self.mesh = _device_mesh(tuple(sizes.values()), found[: self.devices])
        self._name = config.layout
        self._own = [(pattern, parse_spec(spec)) for pattern, spec in config.rules.items()]
        self._rules = rules
        self.rows, self._whole = NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())

    def __str__(self) -> str:
        if self._name == "jit":
            return f"jit on {self._all}" if self._all.startswith("1 ") else f"jit on 1 of {self._all}"
        shape = "x".join(str(size) for size in self.mesh.shape.values())
        return f"mesh {shape} on {self._all}"

    def shardings(self, shapes: Any) -> Any:
        """The sharding of each leaf of the base.

        Raises:
          ConfigError: if the rules do not fit the base.
        """
        # The user's rules may cover every leaf of one of the network's rules; that is not an error.
        left = [path for path in named_leaves(shapes)[0] if not any(re.search(own, path) for own, _ in self._own)]
        rules = [rule for rule in self._rules if any(re.search(rule[0], path) for path in left)]
        try:
            return jlora.shardings(shapes, self.mesh, [*self._own, *rules])
        except ValueError as error:
            raise ConfigError(f"compute: {error}") from error

    def place_base(self, shapes: Any, load: Callable[[Any], Any]) -> Any:
        return load(self.shardings(jlora.dequantize(shapes)))

    def make_state(self, make: Callable[[Any], TrainState], base: Any) -> TrainState:
        shapes: Any = jax.eval_shape(jax.jit(make), base)  # jit keeps the trace for the second call below
        places = self.state_shardings(shapes, jax.tree.map(lambda x: x.sharding, base))
        # Without out_shardings the moments, which depend on no input, would be replicated on every device.
        return jax.block_until_ready(jax.jit(make, out_shardings=places)(base))

    def state_shardings(self, shapes: TrainState, base: Any) -> TrainState:
        """The sharding of each leaf of a state, from those of the base: adapters and moments follow their weights."""
        adapters: Any = jlora.adapter_shardings(shapes.adapters, base)
        structure = jax.tree.structure(shapes.adapters)

        def is_moment(part: Any) -> bool:
            return jax.tree.structure(part) == structure

        opt_state = jax.tree.map(
            lambda x: adapters if is_moment(x) else self._whole, shapes.opt_state, is_leaf=is_moment
        )
        return TrainState(self._whole, adapters, opt_state)  # type: ignore[arg-type]

    def place_batch(self, build: Callable[[slice], Batch], count: int) -> Any:
        if self.devices == 1:
            batch = build(slice(0, count))
            # On a CPU, jit reads NumPy arrays where they are; elsewhere the transfer starts now, before the step.
            return batch if self.on_host else jax.device_put(dict(batch), self._whole)
        parts: dict[tuple[int, int], Batch] = {}

        def part(index: Any) -> Batch:
            start, stop, _ = index[0].indices(count)
            if (start, stop) not in parts:  # devices along "tensor" compute the same rows
                parts[start, stop] = build(slice(start, stop))
            return parts[start, stop]

        own = self.rows.addressable_devices_indices_map((count,))
        any_rows = part(next(index for index in own.values() if index is not None))
        return {
            name: jax.make_array_from_callback(
                (count, *rows.shape[1:]), self.rows, lambda index, name=name: part(index)[name]
            )
            for name, rows in any_rows.items()
        }

    def lower_step(
        self, step: Step, make: Callable[[Any], TrainState], base: Any, batch: Mapping[str, Any]
    ) -> tuple[TrainState, Any]:
        """The state that ``make(base)`` returns and ``step``, lowered for it: shapes in, nothing is computed.

        Args:
          base: shapes of the base.
          batch: shapes of a batch, ``{name: jax.ShapeDtypeStruct}``.

        Returns:
          The state's shapes with their shardings, and the lowered step, a `jax.stages.Lowered`.

        Raises:
          ConfigError: if the rules do not fit the base.
        """
        places = self.shardings(base)
        base = placed(base, places)
        state: Any = jax.eval_shape(make, base)
        state = placed(state, self.state_shardings(state, places))
        rows = {name: self.rows if self.devices > 1 else self._whole for name in batch}
        key = placed(jax.eval_shape(lambda: jax.random.key(0)), self._whole)
        return state, self.compile_step(step, state).lower(state, base, placed(dict(batch), rows), key)

    def compile_step(self, step: Step, state: TrainState) -> Any:
        places = jax.tree.map(lambda x: x.sharding, state)
        # Pinned: the compiler could choose other shardings for the new state, and the second step would recompile.
        return jax.jit(step, donate_argnums=0, out_shardings=(places, self._whole))

    def compile_rows(self, fn: RowFunction) -> Callable[..., dict[str, np.ndarray]]:
        compiled = jax.jit(fn, out_shardings=self._whole)
        return lambda *args: jax.device_get(compiled(*args))

    def call(self, fn: Callable[..., Any], *trees: Any) -> Any:
        return jax.block_until_ready(jax.jit(fn)(*trees))

    def to_host(self, tree: Any) -> Any:
        if not all(x.is_fully_replicated for x in jax.tree.leaves(tree)):
            tree = jax.jit(lambda x: x, out_shardings=self._whole)(tree)
        return jax.device_get(tree)

    def to_disk(self, state: TrainState) -> TrainState:
        return state

    def from_disk(self, state: TrainState) -> TrainState:
        return state


def _device_mesh(sizes: tuple[int, ...], devices: Sequence[Any]) -> jax.sharding.Mesh:
    kinds = (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # sizes that split an axis of a TPU's torus, such as 8 x 2 on 4 x 4
        split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(split, AXES, axis_types=kinds)


def one_device(devices: Sequence[Any] | None = None) -> Mesh:
    """The first device alone: a mesh of one, printed as jit."""
    return Mesh(ComputeConfig(layout="jit", data=1), REPLICATED, devices)


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes of ``tree``, each with its sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def planned_layout(config: TrainConfig, rules: jlora.ShardingRules, devices: Sequence[Any]) -> Mesh:
    """The layout of a configuration on devices that may not be here; pmap is the mesh that divides the same.

    Raises:
      ConfigError: as `make_layout`.
    """
    match config.compute.layout:
        case "jit":
            layout = one_device(devices)
        case "pmap":
            layout = Mesh(ComputeConfig(layout="mesh"), REPLICATED, devices)
        case "mesh":
            layout = Mesh(config.compute, rules, devices)
    _check_batch_sizes(config, layout)
    return layout


def make_layout(config: TrainConfig, rules: jlora.ShardingRules) -> Layout:
    """The layout of a configuration on this run's devices.

    Args:
      rules: the network's sharding rules, for a mesh.

    Raises:
      ConfigError: if it does not fit the devices, or the batch sizes.
    """
    compute = config.compute
    if compute.layout == "jit" and jax.process_count() > 1:
        raise ConfigError(
            f"compute.layout: got 'jit', which computes on one device, in {jax.process_count()} processes; expected "
            "pmap or mesh; pass --compute.layout mesh"
        )
    layout: Layout = {"jit": one_device, "pmap": Pmap, "mesh": lambda: Mesh(compute, rules)}[compute.layout]()
    _check_batch_sizes(config, layout)
    return layout


def _check_batch_sizes(config: TrainConfig, layout: Layout) -> None:
    compute = config.compute
    multiple = layout.parts * compute.accumulate
    refuse(
        [
            f"{phase}.batch_size: got {fit.batch_size}, expected a multiple of {multiple}: {layout.parts} parts of the "
            f"rows ({layout}) x compute.accumulate = {compute.accumulate}; pass "
            f"--{phase}.batch-size {max(1, round(fit.batch_size / multiple)) * multiple}"
            for phase, fit in config.phases.items()
            if fit.batch_size % multiple
        ]
    )


def parse_spec(text: str) -> P:
    """Parses a PartitionSpec from `ComputeConfig.rules`, such as ``fsdp,-,fsdp+tensor``."""
    axes = [None if axis == "-" else tuple(axis.split("+")) for axis in text.replace(" ", "").split(",") if axis]
    return P(*(axis[0] if axis and len(axis) == 1 else axis for axis in axes))


def _all_devices() -> str:
    return _described(jax.devices())


def _described(devices: Sequence[Any]) -> str:
    count, processes = len(devices), jax.process_count()
    some = f"{count} {devices[0].device_kind} device" + ("s" if count > 1 else "")
    return some if processes == 1 else f"{some} of {processes} processes"

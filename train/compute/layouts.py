"""Where a step is computed: one device, `jax.pmap` over copies, or a mesh with sharded weights.

A `Layout` places things and compiles pure functions; the step, the loop and the measurements are the same for all of
them, and so are the numbers, but for rounding and for the masks of dropout under pmap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import named_leaves
from train.compute.step import Step, TrainState
from train.config import ComputeConfig, ConfigError, TrainConfig, refuse
from train.data.batches import Batch

RowFunction: TypeAlias = Callable[[Any, Any, Any], dict[str, jax.Array]]
"""``fn(base, adapters, batch)``: for each row of the batch what is measured."""

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))


class Layout(Protocol):
    """Places the base, the state and batches, and compiles what works on them.

    Attributes:
      axis: for `train.compute.step.make_step`.
      devices: how many compute.
      parts: into how many a batch is divided; its rows are a multiple.
      ahead: how many steps may be under way at once.
    """

    devices: int
    parts: int

    @property
    def axis(self) -> str | None: ...

    @property
    def ahead(self) -> int: ...

    def place_base(self, shapes: Any, load: Callable[[Any], Any]) -> Any:
        """The base at its place. ``load(shardings)`` makes it; these are None, or a tree like ``shapes``."""
        ...

    def make_state(self, make: Callable[[Any], TrainState], base: Any) -> TrainState:
        """``make(base)`` at its place."""
        ...

    def place_batch(self, build: Callable[[slice], Batch], count: int) -> Any:
        """A batch of ``count`` rows, of which each process builds those that its devices compute."""
        ...

    def compile_step(self, step: Step, state: TrainState) -> Callable[..., Any]:
        """``step``, for states that lie as ``state`` does. It takes over the memory of the state that it is given."""
        ...

    def compile_rows(self, fn: RowFunction) -> Callable[..., dict[str, np.ndarray]]:
        """``fn``, whose results for all rows come to every process."""
        ...

    def call(self, fn: Callable[..., Any], *trees: Any) -> Any:
        """A pure function of trees at their places, such as a merge of base and adapters."""
        ...

    def to_host(self, tree: Any) -> Any:
        """NumPy arrays, whole, in every process."""
        ...

    def to_disk(self, state: TrainState) -> TrainState:
        """The state as orbax saves it, from all processes at once."""
        ...

    def from_disk(self, state: TrainState) -> TrainState:
        """The inverse of `to_disk`."""
        ...


def _ahead(devices: int) -> int:
    # On jax 0.10 several steps under way on emulated devices wait for each other's threads, for ever.
    return 1 if devices > 1 and jax.default_backend() == "cpu" else 16


class Jit:
    """One device."""

    axis, devices, parts = None, 1, 1

    def __str__(self) -> str:
        return f"jit on 1 of {_all_devices()}" if jax.device_count() > 1 else f"jit on {_all_devices()}"

    @property
    def ahead(self) -> int:
        return _ahead(1)

    def place_base(self, shapes: Any, load: Callable[[Any], Any]) -> Any:
        return load(None)

    def make_state(self, make: Callable[[Any], TrainState], base: Any) -> TrainState:
        return jax.jit(make)(base)

    def place_batch(self, build: Callable[[slice], Batch], count: int) -> Any:
        return build(slice(0, count))

    def compile_step(self, step: Step, state: TrainState) -> Callable[..., Any]:
        return jax.jit(step, donate_argnums=0)

    def compile_rows(self, fn: RowFunction) -> Callable[..., dict[str, np.ndarray]]:
        compiled = jax.jit(fn)
        return lambda *args: jax.device_get(compiled(*args))

    def call(self, fn: Callable[..., Any], *trees: Any) -> Any:
        return jax.jit(fn)(*trees)

    def to_host(self, tree: Any) -> Any:
        return jax.device_get(tree)

    def to_disk(self, state: TrainState) -> TrainState:
        return state

    def from_disk(self, state: TrainState) -> TrainState:
        return state


class Pmap:
    """A copy of base and state on every device, each of which computes its rows.

    At their places, arrays have a leading axis of this process's devices.
    """

    axis = "devices"

    def __init__(self) -> None:
        self.devices = self.parts = jax.device_count()
        self._local = jax.local_device_count()

    def __str__(self) -> str:
        return f"pmap on {_all_devices()}"

    @property
    def ahead(self) -> int:
        return _ahead(self.devices)

    def place_base(self, shapes: Any, load: Callable[[Any], Any]) -> Any:
        return self._copied(load(None))

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
        mapped = jax.pmap(fn)

        def each(*args: Any) -> dict[str, np.ndarray]:
            own = {name: _local_rows(x) for name, x in mapped(*args).items()}
            return own if jax.process_count() == 1 else multihost_utils.process_allgather(own, tiled=True)

        return each

    def call(self, fn: Callable[..., Any], *trees: Any) -> Any:
        return jax.block_until_ready(jax.pmap(fn)(*trees))

    def to_host(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: np.asarray(_first_copy(x)), tree)

    def to_disk(self, state: TrainState) -> TrainState:
        # To orbax, arrays of this process alone are no arrays of the run; numbers on the host are.
        return self.to_host(state)

    def from_disk(self, state: TrainState) -> TrainState:
        return self._copied(state)

    def _copied(self, tree: Any) -> Any:
        return jax.block_until_ready(jax.pmap(lambda _, x: x, in_axes=(0, None))(np.arange(self._local), tree))


def _first_copy(x: jax.Array) -> jax.Array:
    """One of the copies. It is read where it lies: ``x[0]`` would gather it from all devices."""
    return x.addressable_data(0)[0]


def _local_rows(x: jax.Array) -> np.ndarray:
    """[devices, rows, ...] to [devices * rows, ...]."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data)[0] for shard in shards])


class Mesh:
    """A mesh of devices. Weights lie as the network's rules say, and what is trained as the weights that it adapts."""

    axis = None

    def __init__(self, config: ComputeConfig, rules: jlora.ShardingRules):
        sizes = {axis: getattr(config, axis) for axis in AXES}
        others = config.fsdp * config.tensor
        sizes["data"] = config.data or jax.device_count() // others
        self.devices = math.prod(sizes.values())
        if self.devices > jax.device_count() or config.data is None and jax.device_count() % others:
            raise ConfigError(
                f"compute: a mesh of {' x '.join(f'{axis}={size}' for axis, size in sizes.items())} does not fit on "
                f"{_all_devices()}; expected fsdp x tensor to divide them, or a product with data that is no larger"
            )
        if self.devices < jax.device_count() and jax.process_count() > 1:
            raise ConfigError(
                f"compute: a mesh of {self.devices} devices, where there are {_all_devices()}; expected all of them to "
                "be used: leave compute.data out"
            )
        self.parts = sizes["data"] * sizes["fsdp"]
        self.mesh = jax.make_mesh(
            tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[: self.devices]
        )
        self._own = [(pattern, parse_spec(spec)) for pattern, spec in config.rules.items()]
        self._rules = rules
        self._rows, self._whole = NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.mesh.shape.values())
        return f"mesh {shape} on {_all_devices()}"

    @property
    def ahead(self) -> int:
        return _ahead(self.devices)

    def shardings(self, shapes: Any) -> Any:
        """Where each leaf of the base lies.

        Raises:
          ConfigError: if the rules do not fit the base.
        """
        # Rules of the network that are left without a leaf by the user's own are no mistake.
        left = [path for path in named_leaves(shapes)[0] if not any(re.search(own, path) for own, _ in self._own)]
        rules = [rule for rule in self._rules if any(re.search(rule[0], path) for path in left)]
        try:
            return jlora.shardings(shapes, self.mesh, [*self._own, *rules])
        except ValueError as error:
            raise ConfigError(f"compute: {error}") from error

    def place_base(self, shapes: Any, load: Callable[[Any], Any]) -> Any:
        return load(self.shardings(shapes))

    def make_state(self, make: Callable[[Any], TrainState], base: Any) -> TrainState:
        shapes: Any = jax.eval_shape(make, base)
        adapters = jlora.adapter_shardings(shapes.adapters, jax.tree.map(lambda x: x.sharding, base))
        like_them = jax.tree.structure(shapes.adapters)

        def place(part: Any) -> Any:
            return adapters if jax.tree.structure(part) == like_them else self._whole

        moments = jax.tree.map(place, shapes.opt_state, is_leaf=lambda part: jax.tree.structure(part) == like_them)
        # Without out_shardings the moments, which depend on no input, would all lie whole on every device.
        places: Any = (self._whole, adapters, moments)
        made = jax.jit(make, out_shardings=TrainState(*places))(base)
        return jax.block_until_ready(made)

    def place_batch(self, build: Callable[[slice], Batch], count: int) -> Any:
        parts: dict[tuple[int, int], Batch] = {}

        def part(index: Any) -> Batch:
            start, stop, _ = index[0].indices(count)
            if (start, stop) not in parts:  # devices along "tensor" compute the same rows
                parts[start, stop] = build(slice(start, stop))
            return parts[start, stop]

        own = self._rows.addressable_devices_indices_map((count,))
        any_rows = part(next(index for index in own.values() if index is not None))
        return {
            name: jax.make_array_from_callback(
                (count, *rows.shape[1:]), self._rows, lambda index, name=name: part(index)[name]
            )
            for name, rows in any_rows.items()
        }

    def compile_step(self, step: Step, state: TrainState) -> Callable[..., Any]:
        places = jax.tree.map(lambda x: x.sharding, state)
        # Pinned: the compiler may prefer others for the results, and then the second step would be compiled anew.
        return jax.jit(step, donate_argnums=0, out_shardings=(places, self._whole))

    def compile_rows(self, fn: RowFunction) -> Callable[..., dict[str, np.ndarray]]:
        compiled = jax.jit(fn, out_shardings=self._whole)
        return lambda *args: {name: np.asarray(x.addressable_data(0)) for name, x in compiled(*args).items()}

    def call(self, fn: Callable[..., Any], *trees: Any) -> Any:
        return jax.block_until_ready(jax.jit(fn)(*trees))

    def to_host(self, tree: Any) -> Any:
        whole = jax.jit(lambda x: x, out_shardings=self._whole)(tree)
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)

    def to_disk(self, state: TrainState) -> TrainState:
        return state

    def from_disk(self, state: TrainState) -> TrainState:
        return state


def make_layout(config: TrainConfig, rules: jlora.ShardingRules) -> Layout:
    """The layout that a configuration asks for, on the devices that there are.

    Args:
      rules: the network's own, for a mesh.

    Raises:
      ConfigError: if it does not fit the devices, or they do not divide the batches.
    """
    compute = config.compute
    if compute.layout == "jit" and jax.process_count() > 1:
        raise ConfigError(
            f"compute.layout: got 'jit', which computes on one device, in {jax.process_count()} processes; expected "
            "pmap or mesh; pass --compute.layout mesh"
        )
    layout: Layout = {"jit": Jit, "pmap": Pmap}[compute.layout]() if compute.layout != "mesh" else Mesh(compute, rules)
    multiple = layout.parts * compute.accumulate
    phases: Mapping[str, Any] = {"base": config.base, "fit": config.fit}
    refuse(
        [
            f"{phase}.batch_size: got {fit.batch_size}, expected a multiple of {multiple}: {layout.parts} parts of the "
            f"rows ({layout}) x compute.accumulate = {compute.accumulate}; pass "
            f"--{phase}.batch-size {max(1, round(fit.batch_size / multiple)) * multiple}"
            for phase, fit in phases.items()
            if fit is not None and fit.batch_size % multiple
        ]
    )
    return layout


def parse_spec(text: str) -> P:
    """The PartitionSpec that `ComputeConfig.rules` writes as ``fsdp,-,fsdp+tensor``."""
    axes = [None if axis == "-" else tuple(axis.split("+")) for axis in text.replace(" ", "").split(",") if axis]
    return P(*(axis[0] if axis and len(axis) == 1 else axis for axis in axes))


def _all_devices() -> str:
    kind = jax.devices()[0].device_kind
    count, processes = jax.device_count(), jax.process_count()
    some = f"{count} {kind} device" + ("s" if count > 1 else "")
    return some if processes == 1 else f"{some} of {processes} processes"

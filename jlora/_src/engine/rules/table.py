"""The table of primitives: how `trace` labels each one, and how `lora` computes it.

There is no other: a primitive that `trace` follows has a factored form, and the reverse. What a rule declines for a
certain case, its label must say of that case.
"""

from __future__ import annotations

from typing import NamedTuple

from jlora._src.engine.rules import arithmetic, control_flow, labels, moves, products, writes
from jlora._src.engine.rules.labels import Label
from jlora._src.engine.rules.products import Rule


class Primitive(NamedTuple):
    """A primitive that a weight can meet without being summed.

    Attributes:
      label: how `trace` follows the weight's axes through it.
      rule: how `lora` evaluates it on factored weights.
    """

    label: Label
    rule: Rule


PRIMITIVES: dict[str, Primitive] = {
    "dot_general": Primitive(labels.dot_general, products.dot_general),
    "ragged_dot_general": Primitive(labels.ragged_dot_general, products.ragged_dot_general),
    "conv_general_dilated": Primitive(labels.conv_general_dilated, products.conv_general_dilated),
    "gather": Primitive(labels.gather, products.gather),
    "transpose": Primitive(labels.transpose, moves.transpose),
    "squeeze": Primitive(labels.squeeze, moves.squeeze),
    "broadcast_in_dim": Primitive(labels.broadcast_in_dim, moves.broadcast_in_dim),
    "reshape": Primitive(labels.reshape, moves.reshape),
    "slice": Primitive(labels.keep, moves.slices),
    "dynamic_slice": Primitive(labels.keep, moves.dynamic_slice),
    "rev": Primitive(labels.keep, moves.rev),
    "split": Primitive(labels.keep, moves.split),
    "pad": Primitive(labels.keep, moves.pad),
    "concatenate": Primitive(labels.concatenate, moves.concatenate),
    "stack": Primitive(labels.stack, moves.stack),
    "unstack": Primitive(labels.unstack, moves.unstack),
    "convert_element_type": Primitive(labels.convert_element_type, moves.convert_element_type),
    "stop_gradient": Primitive(labels.stop_gradient, moves.stop_gradient),
    "optimization_barrier": Primitive(labels.each, moves.optimization_barrier),
    "neg": Primitive(labels.keep, arithmetic.neg),
    **dict.fromkeys(("mul", "div"), Primitive(labels.scale, arithmetic.scale)),
    **dict.fromkeys(("add", "sub"), Primitive(labels.add, arithmetic.add)),
    **dict.fromkeys(("scatter", "scatter-mul", "dynamic_update_slice"), Primitive(labels.overwrite, writes.overwrite)),
    **dict.fromkeys(("scatter-add", "scatter-sub"), Primitive(labels.add_at, writes.add_at)),
    "select_n": Primitive(labels.select_n, arithmetic.select_n),
    **dict.fromkeys(("square", "integer_pow"), Primitive(labels.square, arithmetic.square)),
    "reduce_sum": Primitive(labels.reduce_sum, arithmetic.reduce_sum),
    **dict.fromkeys(
        ("copy", "copy_p", "name", "sharding_constraint", "reduce_precision"), Primitive(labels.keep, moves.keep)
    ),
    **dict.fromkeys(("jit", "pjit"), Primitive(labels.call, control_flow.jit)),
    **dict.fromkeys(("remat2", "checkpoint"), Primitive(labels.call, control_flow.checkpoint)),
    "compute_on": Primitive(labels.settled_call, control_flow.compute_on),
    "cond": Primitive(labels.cond, control_flow.cond),
    "while": Primitive(labels.while_loop, control_flow.while_loop),
    "scan": Primitive(labels.scan, control_flow.scan),
    "shard_map": Primitive(labels.settled_call, control_flow.shard_map),
    **dict.fromkeys(
        ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call"),
        Primitive(labels.custom_rule, control_flow.custom_rule),
    ),
    "pvary": Primitive(labels.keep, control_flow.vary),
    **dict.fromkeys(("reshard", "mesh_cast"), Primitive(labels.keep, control_flow.reshard)),
    "all_gather": Primitive(labels.all_gather, control_flow.all_gather),
    "device_put": Primitive(labels.each, control_flow.device_put),
}

SQUARES = frozenset("reduce_sum convert_element_type jit pjit remat2 checkpoint".split())
"""Primitives that take the square of a weight, which is put off until it is summed; any other needs its entries."""
SQUARED = "it is squared entry by entry"

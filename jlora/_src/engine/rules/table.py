"""The table of primitives: how `lora` computes each one, and how `trace` labels it.

There is no other table: every primitive that `trace` follows has a factored form, and vice versa. Whatever a rule
declines in some case, its label must report for that case.
"""

from __future__ import annotations

from typing import NamedTuple

from jlora._src.engine.rules import arithmetic, control_flow, joins, lookups, moves, placement, products, writes
from jlora._src.engine.rules.rule import Label, Rule, label_first, label_unchanged


class Primitive(NamedTuple):
    """A primitive that takes a weight without materializing it.

    Attributes:
      rule: how `lora` evaluates it on factored weights.
      label: how `trace` follows the weight's axes through it.
    """

    rule: Rule
    label: Label


def _all(names: str, rule: Rule, label: Label) -> dict[str, Primitive]:
    return dict.fromkeys(names.split(), Primitive(rule, label))


PRIMITIVES: dict[str, Primitive] = {
    "dot_general": Primitive(products.dot_general, products.label_dot_general),
    "ragged_dot_general": Primitive(products.ragged_dot_general, products.label_ragged_dot_general),
    "conv_general_dilated": Primitive(products.conv_general_dilated, products.label_conv_general_dilated),
    "gather": Primitive(lookups.gather, lookups.label_gather),
    "neg": Primitive(arithmetic.neg, label_first),
    **_all("mul div", arithmetic.scale, arithmetic.label_scale),
    **_all("add sub", arithmetic.add, arithmetic.label_add),
    **_all("square integer_pow", arithmetic.square, arithmetic.label_square),
    "reduce_sum": Primitive(arithmetic.reduce_sum, arithmetic.label_reduce_sum),
    "select_n": Primitive(arithmetic.select_n, arithmetic.label_select_n),
    **_all("scatter scatter-mul dynamic_update_slice", writes.overwrite, writes.label_overwrite),
    **_all("scatter-add scatter-sub", writes.add_at, writes.label_add_at),
    "transpose": Primitive(moves.transpose, moves.label_transpose),
    "squeeze": Primitive(moves.squeeze, moves.label_squeeze),
    "broadcast_in_dim": Primitive(moves.broadcast_in_dim, moves.label_broadcast_in_dim),
    "reshape": Primitive(moves.reshape, moves.label_reshape),
    "slice": Primitive(moves.slices, label_first),
    "dynamic_slice": Primitive(moves.dynamic_slice, label_first),
    "rev": Primitive(moves.rev, label_first),
    "split": Primitive(moves.split, label_first),
    "pad": Primitive(moves.pad, label_first),
    "unstack": Primitive(moves.unstack, moves.label_unstack),
    "concatenate": Primitive(joins.concatenate_weights, joins.label_concatenate),
    "stack": Primitive(joins.stack, joins.label_stack),
    "convert_element_type": Primitive(moves.convert_element_type, moves.label_convert_element_type),
    "stop_gradient": Primitive(moves.stop_gradient, moves.label_stop_gradient),
    "optimization_barrier": Primitive(moves.optimization_barrier, label_unchanged),
    **_all("copy copy_p name sharding_constraint reduce_precision", moves.keep, label_first),
    **_all("jit pjit", control_flow.jit, control_flow.label_call),
    **_all("remat2 checkpoint", control_flow.checkpoint, control_flow.label_call),
    "adapted_product": Primitive(control_flow.adapted_product, control_flow.label_adapted_product),
    "compute_on": Primitive(control_flow.compute_on, control_flow.label_materialized_call),
    "shard_map": Primitive(control_flow.shard_map, control_flow.label_materialized_call),
    **_all(
        "custom_jvp_call custom_vjp_call custom_vmap_call", control_flow.custom_rule, control_flow.label_custom_rule
    ),
    "cond": Primitive(control_flow.cond, control_flow.label_cond),
    "while": Primitive(control_flow.while_loop, control_flow.label_while),
    "scan": Primitive(control_flow.scan, control_flow.label_scan),
    "pvary": Primitive(placement.pvary, label_first),
    **_all("reshard mesh_cast", placement.reshard, label_first),
    "all_gather": Primitive(placement.all_gather, placement.label_all_gather),
    "device_put": Primitive(placement.device_put, label_unchanged),
}

SQUARES = frozenset("reduce_sum convert_element_type jit pjit remat2 checkpoint".split())
"""Primitives that take the square of a weight before it is summed; any other needs the entries."""
SQUARED = "it is squared elementwise"
KEEPS_STORED = frozenset(
    "dot_general ragged_dot_general conv_general_dilated gather transpose squeeze broadcast_in_dim reshape slice "
    "dynamic_slice rev split unstack convert_element_type stop_gradient optimization_barrier copy copy_p name "
    "sharding_constraint reduce_precision jit pjit remat2 checkpoint shard_map cond while scan pvary "
    "custom_jvp_call custom_vjp_call custom_vmap_call".split()
)
"""Primitives that take a quantized weight as it is stored; for any other it is dequantized."""
REARRANGING = frozenset(
    "dot_general conv_general_dilated transpose reshape squeeze broadcast_in_dim convert_element_type copy copy_p name "
    "slice rev neg sharding_constraint jit pjit remat2 checkpoint".split()
)
"""Primitives for which rows picked by constant indices are still a weight; for any other they are a lookup."""

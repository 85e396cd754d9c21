"""Names the tensors of a model and of a checkpoint.

    table.<table>                         rows of a sharded table
    dense.<parameter>                     everything else that has weights: `nn.Module.state_dict`
    ids.<table>.<tensor>                  which id has which row, for a table with managed ids
    table_optimizer.<table>.<state>       state of the fused table optimizer
    dense_optimizer.<parameter>.<state>   state of AdamW
    dense_last.<parameter>                the last weights, which training goes on from, where `dense` has their mean

Names are an interface: checkpoints of earlier versions are found by them.
"""

import functools
import typing

TABLE, DENSE, IDS = "table", "dense", "ids"
TABLE_OPTIMIZER, DENSE_OPTIMIZER = "table_optimizer", "dense_optimizer"
DENSE_LAST = "dense_last"
BACKBONE = "backbone."
"""Prefix of token embedder (small tables, segment), projection in and tower: what full transfer moves."""
TOWER = f"{BACKBONE}tower."
ITEM_BIAS = "item_score.bias_V"
"""Bias that a pretraining learns for each row of the item table, beside its vector."""
_SMALL = (f"{BACKBONE}embedder.small.", "context.small.")


@functools.cache
def module_key(name: str) -> str:
    """Turns the name of a feature, table or task into a key of a module dict, where dots and attributes cannot be."""
    from torch import nn  # imported here, because a report reads names and must not need torch

    key = name.replace(".", "_")
    is_taken = any(hasattr(cls(), key) for cls in (nn.ModuleDict, nn.ParameterDict))
    return f"{key}_" if is_taken else key


def table_weight(table: str) -> str:
    """Names a sharded table's rows in a checkpoint."""
    return f"{TABLE}.{table}"


def dense_weight(parameter: str) -> str:
    """Names a parameter or buffer of the dense model in a checkpoint."""
    return f"{DENSE}.{parameter}"


def small_table(table: str) -> str:
    """Names the parameter of the dense model that holds a small table, which every rank keeps whole."""
    return small_tables(table, ())[0]


def small_tables(table: str, features: typing.Iterable[str]) -> tuple[str, ...]:
    """Names the parameters that may hold a small table: that of token features, and one per `feature` of the heads."""
    of_tokens, of_heads = _SMALL
    return f"{of_tokens}{module_key(table)}.weight", *(f"{of_heads}{module_key(name)}.weight" for name in features)


def is_table(name: str) -> bool:
    """Says whether a tensor of a checkpoint holds the rows of a table, sharded or small."""
    return name.startswith((f"{TABLE}.", *(f"{DENSE}.{small}" for small in _SMALL)))


def is_weight(name: str) -> bool:
    """Says whether a tensor of a checkpoint is part of the model, not of an optimizer or the map of managed ids."""
    return name.startswith((f"{TABLE}.", f"{DENSE}."))

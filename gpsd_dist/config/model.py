"""Options of the dense tower, and which model reads which of them. Neither gin nor torch is imported here."""

import collections.abc
import dataclasses
import typing

from gpsd_dist.validation import below, check_types, raise_all

POSITION_TABLE_MODELS = ("sasrec", "hstu")  # a learned vector per position: histories must fit
_EVERY_MODEL = frozenset({"name", "width", "dropout", "init_std", "context_dim", "compile"})
READS: dict[str, frozenset[str]] = {
    name: _EVERY_MODEL | set(own.split())
    for name, own in {
        "transformer": "layers heads",
        "sasrec": "layers heads max_positions ffn_width",
        "hstu": "layers heads max_positions head_width time_bias",
        "deepfm": "",
        "din": "",
        "dien": "",
        "dmin": "heads",
        "wukong": "layers max_positions",
    }.items()
}
"""Fields of ModelConfig that each of `gpsd_dist.model.registry.TOWERS`, or what is built around it, computes with."""
_SIZES = {"layers": "L", "width": "H", "heads": "A"}  # letters of the paper
_NEVER_SHARED = ("head_width", "ffn_width", "time_bias")  # no macro of configs/base.gin, and no leaf of two models


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dense tower and heads; `l{layers}h{width}a{heads}` in the paper."""

    name: str = "transformer"
    """transformer | sasrec | hstu | deepfm | din | dien | dmin | wukong: `gpsd_dist.model.registry.TOWERS`."""
    layers: int = 4
    width: int = 64
    """D"""
    heads: int = 4
    dropout: float = 0.0
    """On token embeddings, and on what attention and feed-forward add; off in evaluation. The paper uses none."""
    init_std: float = 0.02
    """Standard deviation of initial linear weights (official settings). 0: 1 / sqrt(fan-in), which learns in half the
    steps at width 64, but generalised worse from the few labels of Grocery (docs/results.md)."""
    context_dim: int = 16
    """Width of the embedding of a context or candidate-only feature with a small table."""
    compile: bool = False
    """torch.compile the tower. On CPU, 4 layers on 512 Grocery requests, forward and backward: 1.03x (0.92 - 1.17) at
    width 64, 1.05x (1.04 - 1.06) at 256 (10 pairs), after 70 - 80 s for the first 4 steps beside other work."""
    max_positions: int = 211
    """sasrec, hstu: rows of the position table; must exceed max_history_length. hstu divides attention by it. 211: the
    200 of ML-1M and ML-20M plus the 11 that the authors add. wukong: slots of a history."""
    head_width: int = 0
    """hstu: width of a head's queries, keys and values; 0: width / heads."""
    ffn_width: int = 0
    """sasrec: hidden width of the feed-forward part; 0: width."""
    time_bias: bool = True
    """hstu: attention also sees the time from every event to the *next* one, up to the predicted one itself."""

    def __post_init__(self) -> None:
        check_types(self)
        problems = []
        for name in ("layers", "width", "heads", "context_dim", "max_positions"):
            problems += below(self, name, 1)
        for name in ("init_std", "head_width", "ffn_width"):
            problems += below(self, name, 0)
        if self.heads > 0 and self.name == "transformer" and self.width % (2 * self.heads):
            problems.append(f"width {self.width} must be a multiple of 2 x heads = {2 * self.heads} (rotary pairs)")
        if self.heads > 0 and self.name in POSITION_TABLE_MODELS and self.head_width == 0 and self.width % self.heads:
            problems.append(f"width {self.width} must be a multiple of heads = {self.heads}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout {self.dropout} must be in [0, 1)")
        raise_all(self, problems)

    def unread(self) -> list[str]:
        """Options that were set, to something else than their default, and that this model does not read."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        reads = READS.get(self.name, frozenset(defaults))  # a name that is none is refused elsewhere
        return [n for n, value in defaults.items() if n not in reads and getattr(self, n) != value]

    def refuse_foreign(self) -> None:
        """ValueError if an option was set that this model does not have, of those that no configuration file sets for
        every model, as it does with `layers`: see `unread` for all of them.
        """
        set_here = [name for name in self.unread() if name in _NEVER_SHARED]
        raise_all(self, [f"{name} {getattr(self, name)} has no effect on {self.name!r}" for name in set_here])


def size_text(model: collections.abc.Mapping[str, typing.Any]) -> str:
    """Size as a title shows it, in what the model reads alone: L4H64A4 of a transformer, H64 of din, L3H128 of wukong.

    `model`: fields of ModelConfig, also those of an older or damaged file: what is missing is "?".
    """
    name = model.get("name")
    reads: collections.abc.Collection[str] = _SIZES
    if isinstance(name, str) and name in READS:
        reads = READS[name]
    return "".join(f"{letter}{model.get(size, '?')}" for size, letter in _SIZES.items() if size in reads)

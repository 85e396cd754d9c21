"""Holds the options of the dense tower, and what each model can do and reads of them."""

import collections
import collections.abc
import dataclasses
import importlib.util
import os
import pathlib
import sys
import typing

import pydantic

from gpsd_dist.cli.names import PLUGIN
from gpsd_dist.validation import AtLeast0, AtLeast1, NotNegative, OrAuto, checked, did_you_mean, one_of

_EVERY_MODEL = frozenset(
    {
        "name",
        "width",
        "dropout",
        "init_std",
        "parametrization",
        "context_dim",
        "compile",
        "revision",
        "matches",
        "bag_matches",
        "number_buckets",
    }
)
PARAMETRIZATIONS = ("official", "by_width")
_SIZES = {"layers": "L", "width": "H", "heads": "A"}  # letters of the paper
_PROJECTION_EPS = {1: 1e-5, 2: 1e-6, 3: 1e-6}
_REBUILT = ("deepfm", "dmin", "wukong")  # in revision 2


@dataclasses.dataclass(frozen=True)
class Traits:
    """Says what a model can do, for all code that must not import torch."""

    own_options: str = ""
    """Fields of ModelConfig that it reads besides those that every model reads, with blanks between them."""
    is_generative: bool = False
    """Histories have states of their own: needed for pretraining and full transfer."""
    supervises_history: bool = False
    """A call `with_history` also returns states of the histories, for the next-behaviour loss."""
    has_blocks: bool = False
    """Its activations can be computed again block by block (activation checkpointing)."""
    has_position_table: bool = False
    """It learns a vector per position, so histories must fit."""
    takes_padded_batches: bool = False
    """Tokens may be padded to a multiple (token_multiple)."""

    @property
    def reads(self) -> frozenset[str]:
        """Lists the fields of ModelConfig that the tower, or what is built around it, computes with."""
        return _EVERY_MODEL | set(self.own_options.split())


MODELS: dict[str, Traits] = {
    "transformer": Traits("layers heads", is_generative=True, has_blocks=True, takes_padded_batches=True),
    "sasrec": Traits(
        "layers heads max_positions ffn_width", is_generative=True, has_blocks=True, has_position_table=True
    ),
    "hstu": Traits(
        "layers heads max_positions head_width time_bias", is_generative=True, has_blocks=True, has_position_table=True
    ),
    "deepfm": Traits(),
    "din": Traits(),
    "dien": Traits(supervises_history=True),
    "dmin": Traits("heads", supervises_history=True),
    "wukong": Traits("layers max_positions"),
}
"""Every value of `ModelConfig.name`. `gpsd_dist.model.registry.TOWERS` has the classes of these names."""
_PLUGIN_NAME = "gpsd_plugin"


def _check_name(name: str) -> str:
    """Accepts the names in MODELS; before it refuses another one, it runs the file that may register it.

    The file is named by the user's command line or environment alone: no configuration and no checkpoint names code.
    """
    path = os.environ.get(PLUGIN)
    if name not in MODELS and path and _PLUGIN_NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_PLUGIN_NAME, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{PLUGIN}={path}: expected a Python file")
        sys.modules[_PLUGIN_NAME] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[_PLUGIN_NAME]  # asked again, it fails again, and says why
            raise
    if name not in MODELS:
        more = "" if path else f"; a model of your own: --plugin FILE, or {PLUGIN}=FILE"
        raise ValueError(f"{name!r} is not one of {tuple(MODELS)}{did_you_mean(name, MODELS)}{more}")
    return name


def plugin_file() -> pathlib.Path | None:
    """Returns the file of the user that this process has run because of the model's name; None: it ran none."""
    module = sys.modules.get(_PLUGIN_NAME)
    return None if module is None else pathlib.Path(os.path.abspath(str(module.__file__)))


def saved_revision(raw: collections.abc.Mapping[str, typing.Any], embedding_dim: typing.Any) -> int:
    """Finds the revision of a saved ModelConfig from before there was one: the newest that computes the same.

    `embedding_dim`: width of its tables.
    """
    width, name = (raw.get(option, getattr(ModelConfig, option)) for option in ("width", "name"))
    return 2 if width == embedding_dim and name not in _REBUILT else 1


def models_with(trait: str) -> list[str]:
    """Lists the models that have a trait, for messages."""
    return sorted(name for name, traits in MODELS.items() if getattr(traits, trait))


def _heads_divide_the_width(model: "ModelConfig") -> collections.abc.Iterator[str]:
    """Heads share the width out evenly, and rotary encoding turns columns of a head in pairs."""
    if model.heads < 1:
        return
    if model.name == "transformer" and model.width % (2 * model.heads):
        yield f"width {model.width} must be a multiple of 2 x heads = {2 * model.heads} (rotary pairs)"
    if model.name in ("sasrec", "hstu") and model.head_width == 0 and model.width % model.heads:
        yield f"width {model.width} must be a multiple of heads = {model.heads}"


@checked(rules=(_heads_divide_the_width,))
class ModelConfig:
    """Sizes the dense tower and its heads; `l{layers}h{width}a{heads}` in the paper."""

    name: typing.Annotated[str, pydantic.AfterValidator(_check_name)] = "transformer"
    """transformer | sasrec | hstu | deepfm | din | dien | dmin | wukong: `gpsd_dist.model.registry.TOWERS`."""
    layers: AtLeast1 = 4
    """Blocks of a transformer, sasrec or hstu, layers of a wukong."""
    width: AtLeast1 = 64
    """D, width of a token's state."""
    heads: AtLeast1 = 4
    """Attention heads, which share the width. transformer, sasrec, hstu, dmin."""
    dropout: typing.Annotated[float, pydantic.Field(ge=0, lt=1), OrAuto] = 0.0
    """On token embeddings, and on what attention and feed-forward add; off in evaluation. The paper uses none; 'auto':
    up to 0.2, the more the more weights there are for each example."""
    init_std: NotNegative = 0.02
    """Standard deviation of initial linear weights of the tower (official settings); 0: 1 / sqrt(fan-in)."""
    context_dim: AtLeast1 = 16
    """Width of the embedding of a context or candidate-only feature with a small table."""
    compile: bool = False
    """torch.compile the tower. On CPU, 4 layers on 512 Grocery requests, forward and backward: 1.03x (0.92 - 1.17) at
    width 64, 1.05x (1.04 - 1.06) at 256 (10 pairs), after 70 - 80 s for the first 4 steps beside other work."""
    max_positions: AtLeast1 = 211
    """sasrec, hstu: rows of the position table; must exceed max_history_length. hstu divides attention by it. 211: the
    200 of ML-1M and ML-20M plus the 11 that the authors add. wukong: slots of a history."""
    head_width: AtLeast0 = 0
    """hstu: width of a head's queries, keys and values; 0: width / heads."""
    ffn_width: AtLeast0 = 0
    """sasrec: hidden width of the feed-forward part; 0: width."""
    time_bias: bool = True
    """hstu: attention also sees the time from every event to the *next* one, up to the predicted one itself."""
    revision: typing.Annotated[int, pydantic.Field(ge=1, le=3)] = 3
    """Form of the model. 3: that of today. 2: dien and dmin that start by_width read the official sum of a history. 1:
    that of runs up to commit 14e4532, where the norms of projections (WIDTH other than EMBEDDING_DIM) have eps
    1e-5 instead of 1e-6. A run that goes on from weights keeps theirs."""
    parametrization: typing.Annotated[str, one_of(PARAMETRIZATIONS)] = "official"
    """Sizes of what a model starts from. official: one `init_std` for all linear weights | by_width: signals of a size
    that narrow models learn from (docs/learning.md). Ranking MLPs, activation units and embeddings of the context
    start from 1 / sqrt(fan-in); half of the attention heads of the Transformer and of HSTU look for like tokens; towers
    without norms (deepfm, din, dien, dmin, wukong) multiply their tokens by sqrt(EMBEDDING_DIM); the sum of a history
    that dien and dmin read is divided by the root of its length."""
    matches: typing.Annotated[bool, OrAuto] = False
    """Ranking heads also get, for each categorical feature that candidates and events share, how often the candidate's
    value is in its history, the share of the events, and how long ago it was last (no official setting). A tower learns
    such a comparison slowly, if at all (docs/learning.md). 'auto': on, and off in old runs."""
    bag_matches: typing.Annotated[bool, OrAuto] = False
    """`matches` are of bags too: of the best of a candidate's elements. 'auto': on, and off in old runs."""

    number_buckets: bool = False
    """Ranking heads also get an embedding of the bucket that each number lies in, 16 by its quantiles in the training
    split (no official setting)."""

    @property
    def starts_by_width(self) -> bool:
        """Says whether `parametrization` is "by_width"."""
        return self.parametrization == "by_width"

    @property
    def head_init_std(self) -> float:
        """Gives the standard deviation of what decides, behind the tower or within it; 0: 1 / sqrt(fan-in)."""
        return 0.0 if self.starts_by_width else self.init_std

    @property
    def scales_history_sum(self) -> bool:
        """Says whether the sum of a history that the head of dien and dmin reads is divided by the root of its length.

        A head that reads an unscaled sum tells users apart by it, and overfits (docs/learning.md).
        """
        return self.starts_by_width and self.revision >= 3

    @property
    def projection_eps(self) -> float:
        """Gives the eps of the RMSNorms beside projections between the widths of tables and tower."""
        return _PROJECTION_EPS[self.revision]

    def check_revision(self) -> None:
        """Raises a ValueError if the model is not built any more in this revision."""
        if self.revision < 2 and self.name in _REBUILT:
            raise ValueError(
                f"model {self.name!r} of revision {self.revision} (a run of commit 14e4532 or before) is not built any "
                "more, because its layers were not those of the official code; read such a run with commit 14e4532, or "
                "train it anew (STRATEGY ST and ST_SF take over its tables)"
            )

    def unread(self) -> list[str]:
        """Lists the options that were set to something else than their default and that this model does not read."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        reads = MODELS[self.name].reads
        return [n for n, value in defaults.items() if n not in reads and getattr(self, n) != value]

    def refuse_foreign(self) -> None:
        """Raises a ValueError if an option was set that one other model alone has.

        Options of several models, such as `layers`, are set for all of them by configuration files: see `unread`.
        """
        readers = collections.Counter(name for traits in MODELS.values() for name in traits.reads)
        foreign = [f"{n} {getattr(self, n)} has no effect on {self.name!r}" for n in self.unread() if readers[n] == 1]
        if foreign:
            raise ValueError(f"ModelConfig: {'; '.join(foreign)}")


def size_text(model: collections.abc.Mapping[str, typing.Any]) -> str:
    """Shortens a size for titles, to what the model reads: L4H64A4 of a transformer, H64 of din, L3H128 of wukong.

    `model`: fields of ModelConfig, also those of an older or damaged file: what is missing is "?".
    """
    name = model.get("name")
    reads: collections.abc.Collection[str] = MODELS[name].reads if isinstance(name, str) and name in MODELS else _SIZES
    return "".join(f"{letter}{model.get(size, '?')}" for size, letter in _SIZES.items() if size in reads)

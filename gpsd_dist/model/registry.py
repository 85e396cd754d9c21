"""Maps `ModelConfig.name` to towers, one line per model, and defines the protocol that a tower implements."""

import typing

import torch

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.config.model import MODELS, Traits
from gpsd_dist.model.deepfm import DeepFM
from gpsd_dist.model.dien import DIEN
from gpsd_dist.model.din import DIN
from gpsd_dist.model.dmin import DMIN
from gpsd_dist.model.hstu import HSTU
from gpsd_dist.model.sasrec import SASRec
from gpsd_dist.model.transformer import Transformer
from gpsd_dist.model.wukong import Wukong


class Times(typing.NamedTuple):
    """Holds times in epoch seconds, int64; -1 where the log does not say."""

    history_T: torch.Tensor  # time of every history token
    request_B: torch.Tensor
    """Time of every request: that of its candidates, so of what comes after the history; -1 in pretraining."""


class Tower(typing.Protocol):
    """Maps token vectors to states; an nn.Module between embedder and heads. Each paper has a file of its own.

    Shape letters: S tokens in packed order (T of histories, then C candidates), F token features, D width.
    """

    reads_fields: typing.ClassVar[bool]
    """False: a token is one vector, the sum of its features [S, D]. True: one vector per feature [S, F, D]."""
    has_segments: typing.ClassVar[bool]
    """Whether a learned vector is added to tell candidates from histories (sums only)."""
    drops_inputs: typing.ClassVar[bool]
    """Whether the tower applies dropout to its input itself, after what it adds to it; else the backbone does."""
    out_width: int  # Width of a candidate's state
    direct_width: int
    """First columns of a candidate's state that skip the ranking MLP's hidden layers and enter its last one."""
    mlp_widths: tuple[int, ...]
    """Hidden widths of the ranking MLP that reads the rest of the state and the context; empty: a linear layer."""

    def __init__(self, config: ModelConfig, num_fields: int):
        """Builds the tower for tokens of `num_fields` features. ValueError for options that the model cannot have."""

    def compile(self, *, dynamic: bool) -> None:
        """Compiles in place; nn.Module has it."""

    def __call__(
        self,
        x: torch.Tensor,
        packing: Packing,
        candidates_only: bool = False,
        times: Times | None = None,
        with_history: bool = False,
    ) -> torch.Tensor:
        """Maps token vectors to states [S, D], or with `candidates_only` to [C, out_width].

        A tower that is not generative is called with `candidates_only` only. Candidates see their request's history and
        themselves, never each other. `with_history` (only if `supervises_history`) also returns theirs, [T, F D].
        """


TOWERS: dict[str, type[Tower]] = {
    "transformer": Transformer,
    "hstu": HSTU,
    "sasrec": SASRec,
    "deepfm": DeepFM,
    "din": DIN,
    "dien": DIEN,
    "dmin": DMIN,
    "wukong": Wukong,
}
"""One line per model; what else the program must know of it, without torch, is in `gpsd_dist.config.model.MODELS`."""


def register(name: str, tower: type[Tower], traits: Traits | None = None) -> None:
    """Adds a model of a user: `ModelConfig.name = name` then builds `tower`. `examples/own_model.py` does it.

    Every command finds it in the file of the environment variable GPSD_PLUGIN, which `gpsd-dist COMMAND --plugin FILE`
    sets. `traits`: what it can do, and the options of ModelConfig that it reads besides those that every model reads.
    ValueError if the name is taken.
    """
    if name in TOWERS:
        raise ValueError(f"there is a model {name!r} already; choose another name")
    MODELS[name], TOWERS[name] = traits or Traits(), tower

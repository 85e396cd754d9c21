"""Lists the stages. A third one is one more file with a class like these, and one more function here."""

import typing

from gpsd_dist.validation import did_you_mean

if typing.TYPE_CHECKING:
    from gpsd_dist.stages.stage import Stage


def _pretrain() -> "type[Stage]":
    from gpsd_dist.stages.pretrain import Pretrain

    return Pretrain


def _finetune() -> "type[Stage]":
    from gpsd_dist.stages.finetune import Finetune

    return Finetune


STAGES = {"pretrain": _pretrain, "finetune": _finetune}  # functions: a name is checked before torch is imported


def check(name: str) -> None:
    """Raises ValueError if there is no stage of this name; it names those that there are."""
    if name not in STAGES:
        raise ValueError(f"stage {name!r} is not one of {tuple(STAGES)}{did_you_mean(name, STAGES)}")


def find(name: str) -> "type[Stage]":
    """Returns the stage of this name, to be built from a run and its manifest. ValueError as `check`."""
    check(name)
    return STAGES[name]()

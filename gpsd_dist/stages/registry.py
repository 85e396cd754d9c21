"""Lists the stages. A third one is one more file with a class like these, and one more line here."""

import difflib

from gpsd_dist.config import RunConfig
from gpsd_dist.schema import Manifest
from gpsd_dist.stages.finetune import Finetune
from gpsd_dist.stages.pretrain import Pretrain
from gpsd_dist.stages.stage import Stage

STAGES: dict[str, type[Stage]] = {"pretrain": Pretrain, "finetune": Finetune}


def find(name: str) -> type[Stage]:
    """Returns the stage of this name. ValueError names the stages that there are."""
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"stage {name!r} is not one of {tuple(STAGES)}{hint}")
    return STAGES[name]


def make_stage(run: RunConfig, manifest: Manifest) -> Stage:
    """Builds the stage of a run. ValueError if its options do not fit the data set."""
    return find(run.stage)(run, manifest)

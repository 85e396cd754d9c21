"""Lists the stages. A third one is one more file with a class like these, and one more line here."""

from gpsd_dist.config import RunConfig
from gpsd_dist.schema import Manifest
from gpsd_dist.stages.finetune import Finetune
from gpsd_dist.stages.pretrain import Pretrain
from gpsd_dist.stages.stage import Stage
from gpsd_dist.validation import did_you_mean

STAGES: dict[str, type[Stage]] = {"pretrain": Pretrain, "finetune": Finetune}


def find(name: str) -> type[Stage]:
    """Returns the stage of this name. ValueError names the stages that there are."""
    if name not in STAGES:
        raise ValueError(f"stage {name!r} is not one of {tuple(STAGES)}{did_you_mean(name, STAGES)}")
    return STAGES[name]


def make_stage(run: RunConfig, manifest: Manifest) -> Stage:
    """Builds the stage of a run. ValueError if its options do not fit the data set."""
    return find(run.stage)(run, manifest)

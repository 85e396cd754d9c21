"""Plans what is trained: models, the pretrainings they start from, and the command of each run."""

import argparse
import dataclasses
import pathlib

from gpsd_dist.config import STRATEGIES, RunConfig, gin_files
from gpsd_dist.config.model import MODELS
from gpsd_dist.scaling.ladder import Training, make_training
from gpsd_dist.validation import did_you_mean

DEFAULT_MODEL = "l4h64a4"
FULL = ("FT", "FT_SF")  # strategies that take over the tower
_SET_BY_FIT = ("DATA_DIR", "OUTPUT_DIR", "STRATEGY", "INIT_CHECKPOINT", "REFIT_OF", "SEED")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Holds one run that may be chosen: a model with a strategy."""

    model: str  # name of its file in configs/model; empty where the gin files of the command say it
    strategy: str
    label: str  # in tables: FT_SF, or l4h64a4 FT_SF beside other models
    training: Training
    refit: Training


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the trainings in their order, and what is left out and why."""

    pretrainings: tuple[Training, ...]
    contestants: tuple[Contestant, ...]
    notes: tuple[str, ...]


def make_plan(args: argparse.Namespace, can_pretrain: bool) -> Plan:
    """Plans all runs: parses every command line, runs nothing. ValueError says what does not fit."""
    models, strategies = _models(args), _strategies(args.strategies)
    _check_overrides(args)
    notes: list[str] = []
    if not can_pretrain and set(strategies) != {"NT"}:
        notes.append("the data have no histories before the training period (split `pretrain`): only NT is trained")
        strategies = ("NT",)
    pretrainings: dict[str, Training] = {}
    contestants: list[Contestant] = []
    for model in models:
        name = training_of(args, model, "finetune", ("--gin.STRATEGY=NT",), "nt").run.model.name
        is_generative = MODELS[name].is_generative
        for strategy in strategies:
            if strategy in FULL and not is_generative:
                notes.append(f"{model} has no generative pretraining of its own: {strategy} is left out for it")
                continue
            start: tuple[str, ...] = ()
            if strategy != "NT":
                source = model if is_generative else _donor(args, models)
                if source not in pretrainings:
                    pretrainings[source] = training_of(args, source, "pretrain", (), "pretrain")
                start = (f"--gin.INIT_CHECKPOINT={pretrainings[source].folder}",)
            options, folder = (f"--gin.STRATEGY={strategy}", *start), strategy.lower()
            training = training_of(args, model, "finetune", options, folder)
            if strategy != "NT":
                _check_transferable(pretrainings[source].run, training.run)
            refit = (*options, f"--gin.REFIT_OF={training.folder}")
            again = training_of(args, model, "finetune", refit, f"{folder}_refit")
            label = f"{model} {strategy}" if len(models) > 1 else strategy
            contestants.append(Contestant(model, strategy, label, training, again))
    if not contestants:
        raise ValueError(f"nothing is left to train: {'; '.join(notes)}")
    return Plan(tuple(pretrainings.values()), tuple(contestants), tuple(dict.fromkeys(notes)))


def _models(args: argparse.Namespace) -> tuple[str, ...]:
    """Names the models; one without a name if the gin files of the command say what it is."""
    if args.models is None:
        return ("",) if args.gin_file else (DEFAULT_MODEL,)
    names = tuple(dict.fromkeys(part.strip() for part in args.models.split(",")))
    known = sorted(path.stem for path in (gin_files.CONFIGS / "model").glob("*.gin"))
    wrong = [f"{name!r}{did_you_mean(name, known)}" for name in names if name not in known]
    if wrong:
        raise ValueError(f"--models: there is no {', '.join(wrong)}; configs/model has {', '.join(known)}")
    return names


def _strategies(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip().upper() for part in text.split(",")))
    wrong = [name for name in names if name not in STRATEGIES]
    if wrong:
        raise ValueError(f"--strategies: {', '.join(wrong)} is not one of {', '.join(STRATEGIES)}")
    return names


def _check_overrides(args: argparse.Namespace) -> None:
    for override in (*args.overrides, *args.pretrain_overrides):
        if override.removeprefix("--gin.").split("=")[0] in _SET_BY_FIT:
            raise ValueError(
                f"{override}: {', '.join(_SET_BY_FIT)} are set by fit (--data, --out, --seed); leave it out"
            )


def _donor(args: argparse.Namespace, models: tuple[str, ...]) -> str:
    """Chooses whose pretraining a model starts from that has none of its own."""
    for model in models:
        if MODELS[training_of(args, model, "finetune", ("--gin.STRATEGY=NT",), "nt").run.model.name].is_generative:
            return model
    return DEFAULT_MODEL


def _check_transferable(pretraining: RunConfig, run: RunConfig) -> None:
    """Checks sizes that must be equal in both stages: train would refuse them too, but only after the pretraining."""
    parts = [("EMBEDDING_DIM", pretraining.tables.embedding_dim, run.tables.embedding_dim)]
    if run.transfers_tower:
        for name in ("layers", "width", "heads"):
            parts.append((name.upper(), getattr(pretraining.model, name), getattr(run.model, name)))
    wrong = [
        f"{name} is {there} in pretraining and {here} in finetuning" for name, there, here in parts if there != here
    ]
    if wrong:
        raise ValueError(f"{run.strategy}: {'; '.join(wrong)}: give --gin.NAME=N and --pretrain_gin.NAME=N alike")


def training_of(args: argparse.Namespace, model: str, stage: str, options: tuple[str, ...], folder: str) -> Training:
    """Makes one training of `args.data` into `args.out`. ValueError if its options do not fit."""
    given, overrides = (
        (args.gin_file, args.overrides) if stage == "finetune" else (args.pretrain_gin_file, args.pretrain_overrides)
    )
    files = [*(given or [f"configs/stage/{stage}.gin"]), *([f"configs/model/{model}.gin"] if model else [])]
    options = (*overrides, f"--gin.DATA_DIR={args.data}", f"--gin.SEED={args.seed}", *options)
    options += (f"--gin.OUTPUT_DIR={pathlib.Path(args.out, model, folder)}",)
    return make_training(stage, files, options, args.nproc)

"""Lists the commands, and writes them in messages the way in which the user started one.

Code and documentation of modules say `python -m gpsd_dist.train`, which always works. Where the program was started as
`gpsd-dist`, all output says `gpsd-dist train`: `disk.text.shown` and `Parser` call `as_typed`, and nothing else does.
"""

import argparse
import os
import re
import shlex
import typing

PROGRAM = "gpsd-dist"
STARTED_BY = "GPSD_STARTED_BY"
"""Environment variable, which ranks and other children inherit: the name of the program that the user typed."""

PLUGIN = "GPSD_PLUGIN"
"""Environment variable, which children inherit: a Python file that registers models (`model.registry.register`)."""


class Command(typing.NamedTuple):
    """Holds one subcommand: the module whose `main(argv)` does it, and a line of help."""

    module: str
    summary: str


COMMANDS = {  # in the order of use
    "quickstart": Command(
        "gpsd_dist.quickstart", "synthetic log -> models, verdict, report, served scores: does it work?"
    ),
    "synthesize": Command("data_pipeline.synthesize", "a made-up shop log to try things with, as Parquet or CSV"),
    "build": Command("data_pipeline.build", "raw log (CSV, JSON lines, Parquet) -> data set"),
    "inspect": Command("data_pipeline.inspect", "what is in a data set, and what to mend first"),
    "fit": Command("gpsd_dist.fit", "floors, pretraining, models, choice, test, verdict: all in one command"),
    "train": Command("gpsd_dist.train", "train one model; --nproc N: on N processes"),
    "evaluate": Command("gpsd_dist.evaluate", "metrics of a trained run, or of a baseline, on a split"),
    "predict": Command("gpsd_dist.predict", "scores of a split, or of raw requests, as Parquet"),
    "report": Command("gpsd_dist.report", "one HTML page about runs"),
    "export": Command("gpsd_dist.export", "trained run -> artefact that scores raw requests"),
    "counters": Command("gpsd_dist.counters", "newer counts of earlier events for an artefact"),
    "serve": Command("gpsd_dist.serve", "scores over HTTP"),
    "index": Command("gpsd_dist.index", "item vectors of a pretrained run, and search in them"),
    "plan": Command("gpsd_dist.plan", "does a run fit a cluster?"),
    "scaling": Command("gpsd_dist.scaling", "scaling law of a data set"),
    "checkpoint": Command("gpsd_dist.checkpoint", "list, verify, compare and prune checkpoints"),
    "doctor": Command(
        "gpsd_dist.doctor", "check this machine and the installation; --fix cpu|cuda installs the engine"
    ),
}
ON_SEVERAL_PROCESSES = ("train", "evaluate", "predict")
_BY_MODULE = {command.module: name for name, command in COMMANDS.items()}
_TYPED = re.compile(
    r"(?:torchrun|python -m gpsd_dist\.launcher) --nproc_per_node (?P<n>\S+)(?: --standalone)?"
    r" -m (?P<ranks>gpsd_dist\.\w+)"
    r"|python -m (?P<module>(?:gpsd_dist|data_pipeline)\.\w+)(?![\w.]*\.\w)"
)


def as_typed(text: str) -> str:
    """Replaces `python -m gpsd_dist.NAME` by `gpsd-dist NAME`, if that is how the program was started."""
    return _TYPED.sub(_replacement, text) if os.environ.get(STARTED_BY) == PROGRAM else text


def _replacement(found: re.Match[str]) -> str:
    name = _BY_MODULE.get(found["ranks"] or found["module"])
    if name is None:
        return found[0]
    return f"{PROGRAM} {name} --nproc {found['n']}" if found["n"] else f"{PROGRAM} {name}"


def with_plugin(command: str, path: str | None = None) -> str:
    """Puts the user's file of models in front of a command to type, unless it is ""; None: that of this process."""
    path = os.environ.get(PLUGIN) if path is None else path
    return f"{PLUGIN}={shlex.quote(path)} {command}" if path else command


class Parser(argparse.ArgumentParser):
    """Parses options; its help and its errors name commands as the user types them."""

    def __init__(self, *, prog: str | None = None, description: str | None = None, **options: typing.Any):
        # The mark in the docstring of a command is for readers of the code. Usage is indented by the length of `prog`.
        text = (description or "").removeprefix("ENTRY: ")
        super().__init__(prog=prog and as_typed(prog), description=text[:1].upper() + text[1:], **options)

    def _print_message(self, message: str, file: typing.Any = None) -> None:
        super()._print_message(as_typed(message), file)

"""Shows how large signals, gradients and updates of a model are in its first steps, layer by layer.

    python -m benchmarks.signals --data_dir data/mine --models l1h32a4 hstu din deepfm
    python -m benchmarks.signals --data_dir data/mine --models din --set "official=PARAMETRIZATION=official" "ours="

A layer that starts too small shows as an output near 0, a gradient near 0 and a weight that does not move. Each set of
options is trained for --steps steps in this process, at the options of configs/stage/finetune.gin, and written as one
column of a Markdown table:

- out: root mean square of what the module gives, in the first step;
- gradient: of its weight, mean over the steps, before clipping;
- change: how far the weight has moved after the steps, relative to its size at the start.
"""

import argparse
import collections
import logging
import os
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.distributed.runtime import Runtime, process_group
from gpsd_dist.trainer import Trainer

DEFAULT_SETS = ("official=PARAMETRIZATION=official DENSE_LR=1e-3 SPARSE_LR=0.1", "by width=")


class Sizes:
    """Collects sizes of the modules of a model while it trains."""

    def __init__(self, trainer: Trainer):
        model = trainer.components.model
        self.first = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model, self.out, self.gradient = model, {}, collections.defaultdict(float)
        for name, module in model.named_modules():
            if name and not isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.Dropout)):
                module.register_forward_hook(lambda _, __, output, name=name: self._keep(name, output))
        self.steps = 0
        trainer.optimizer.register_step_pre_hook(lambda *_: self._add_gradients())

    def _keep(self, name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.out.setdefault(name, _rms(output))

    def _add_gradients(self) -> None:
        self.steps += 1
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.gradient[name] += _rms(parameter.grad)

    def rows(self) -> dict[str, tuple[float | None, float, float]]:
        """Returns parameter -> (output of its module, gradient, relative change)."""
        found: dict[str, tuple[float | None, float, float]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.ndim < 2:
                continue  # biases and gains start from 0 or 1
            moved = _rms(parameter - self.first[name]) / max(_rms(self.first[name]), 1e-12)
            out = self.out.get(name.removesuffix(".weight"))
            found[name] = (out, self.gradient[name] / max(1, self.steps), moved)
        return found


def measure(
    runtime: Runtime, data_dir: str, model: str, options: list[str], steps: int
) -> dict[str, tuple[float | None, float, float]]:
    """Trains `steps` steps of one model and returns the sizes of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--gin_file", "configs/stage/finetune.gin", "--gin_file", f"configs/model/{model}.gin"]
        fixed = (f"DATA_DIR={data_dir}", f"OUTPUT_DIR={folder}", f"TrainConfig.max_steps={steps}", "PATIENCE=0")
        argv += [f"--gin.{option}" for option in (*fixed, "TrainConfig.async_checkpoints=False", *options)]
        trainer = Trainer(load_run_config(argv).run, runtime)
        trainer.load_weights()
        sizes = Sizes(trainer)
        trainer.train()
        return sizes.rows()


def _rms(x: torch.Tensor) -> float:
    return x.detach().float().square().mean().sqrt().item()


def table(columns: dict[str, dict[str, tuple[float | None, float, float]]]) -> str:
    """Formats sizes as Markdown: a row per weight, three columns per set of options."""
    titles = " | ".join(f"{name}: out | gradient | change" for name in columns)
    lines = [f"| weight | {titles} |", "| --- |" + " ---: |" * (3 * len(columns))]
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    for name in names:
        cells = []
        for rows in columns.values():
            out, gradient, change = rows.get(name, (None, 0.0, 0.0))
            cells += ["" if out is None else f"{out:.2g}", f"{gradient:.1e}", f"{change:.2f}"]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="a prepared data set with labels")
    parser.add_argument("--models", nargs="+", default=["l1h32a4", "hstu", "din", "deepfm"], help="of configs/model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", nargs="+", default=DEFAULT_SETS, metavar="NAME=BINDINGS", help="gin, blanks between")
    args = parser.parse_args(argv)
    with process_group(600) as runtime:
        logging.disable(logging.WARNING)
        for model in args.models:
            columns = {}
            for entry in args.set:
                name, _, bindings = entry.partition("=")
                columns[name] = measure(runtime, args.data_dir, model, bindings.split(), args.steps)
            print(f"\n{model}, {args.steps} steps\n\n{table(columns)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

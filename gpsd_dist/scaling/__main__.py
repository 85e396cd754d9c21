r"""ENTRY: fits the scaling law of a data set, and draws the one-epoch figure.

    python -m gpsd_dist.scaling --ladder l1h32a4,l2h32a4,l4h32a4,l4h64a4 --strategy FT_SF --seeds 0,1,2 \
        --gin_file configs/experiments/grocery_finetune.gin \
        --pretrain_gin_file configs/experiments/grocery_pretrain.gin --out_dir runs/scaling_grocery
    python -m gpsd_dist.scaling --epochs_figure runs/grocery/s0/{nt,st,ft,st_sf,ft_sf} --out_dir runs/epochs_grocery

The first trains every rung with every seed by the ordinary commands, which it shows, scores the split, and fits
AUC = c - a x^-b and log loss = c + a x^-b over the dense parameters x (tables excluded), in
scaling_<strategy>_<split>.json, .png, .svg. The same command again goes on where the last one stopped; finished runs
are kept. Rungs and seeds may join; a file with some that the command leaves out is not replaced. `--gin.X=Y` reaches
finetuning, `--pretrain_gin.X=Y` pretraining; layers, width, heads, seed, strategy and folders are set by the ladder.
The second reads finished runs only: epochs.json, .png, .svg.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.scaling ...")

import argparse
import pathlib

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.commands import add_overrides, exit_status
from gpsd_dist.scaling.ladder import plan

_LADDER_ONLY = ("gin_file", "ladder", "strategy", "pretrain_gin_file", "init_checkpoint", "seeds", "split",
                "nproc_per_node", "embedding_dim_follows_width")  # fmt: skip


def main(argv: list[str]) -> int:
    """Returns 0; 2 for a mistake in options or data; 130 if stopped; else the status of the command that failed."""
    args = _parse(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    trials = [] if args.epochs_figure else plan(args)  # checks every option before what follows imports SciPy
    from gpsd_dist.scaling.summary import epochs_figure, ladder

    if args.epochs_figure:
        epochs_figure(args)
    else:
        ladder(args, trials)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m gpsd_dist.scaling", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out_dir", type=pathlib.Path, required=True)
    ladder = parser.add_argument_group("ladder")
    ladder.add_argument("--ladder", help="rungs: layers, width, heads, like l1h32a4,l4h64a4")
    ladder.add_argument("--strategy", help="NT, ST, FT, ST_SF or FT_SF")
    ladder.add_argument("--gin_file", action="append", default=[], help="of the finetuning; repeatable")
    ladder.add_argument("--pretrain_gin_file", action="append", default=[], help="of the pretraining; repeatable")
    ladder.add_argument("--init_checkpoint", default="", help="ST, ST_SF: one pretraining for all rungs")
    ladder.add_argument("--seeds", help="default 0")
    ladder.add_argument("--split", help="split to score (default: test)")
    ladder.add_argument("--nproc_per_node", type=int, help="processes per run (default 1; more: torchrun)")
    follows_help = "tables as wide as the tower (default: the width in the config, with a projection)"
    ladder.add_argument("--embedding_dim_follows_width", action="store_true", help=follows_help)
    curves = parser.add_argument_group("one-epoch figure")
    curves.add_argument("--epochs_figure", nargs="+", type=pathlib.Path, metavar="RUN_DIR", help="finetuning runs")
    test_help = "also score test with the kept checkpoint of every epoch (TrainConfig.keep_last)"
    curves.add_argument("--with_test_each_epoch", action="store_true", help=test_help)
    args, rest = parser.parse_known_args(argv)
    add_overrides(parser, args, rest)
    if args.epochs_figure and (rest or any(getattr(args, name) for name in _LADDER_ONLY)):
        parser.error("--epochs_figure reads finished runs: leave out the options of the ladder")
    if not args.epochs_figure and args.with_test_each_epoch:
        parser.error("--with_test_each_epoch belongs to --epochs_figure")
    missing = [f"--{name}" for name in ("ladder", "strategy", "gin_file") if not getattr(args, name)]
    if not args.epochs_figure and missing:
        parser.error(f"{', '.join(missing)} missing")
    args.out_dir, args.seeds, args.split = args.out_dir.resolve(), args.seeds or "0", args.split or "test"
    args.nproc_per_node = 1 if args.nproc_per_node is None else args.nproc_per_node
    return args


if __name__ == "__main__":
    sys.exit(run_main(main))

"""ENTRY: fits your own log: baselines, pretraining, models, choice, test, verdict.

    python -m gpsd_dist.fit --data DATA --out RUN

DATA was built from your log by data_pipeline.build. What is done, each step by an ordinary command:

1. without a model: popularity, smoothed rates, boosted trees on `valid`
2. generative pretraining of each model on the histories
3. each model from scratch (NT) and from the pretraining with frozen tables (ST_SF, FT_SF)
4. the best on `valid` (AUC of the first task) is chosen, and trained again on train + valid
5. all are scored on `test`, which decides nothing: a table with 95 % intervals, and one sentence

Options of training are those of the stage and model files; `--gin.X=Y` changes one of the training on labels,
`--pretrain_gin.X=Y` one of the pretraining. Killed? The same command goes on; finished steps are kept. RUN holds
report.html, summary.json, commands.sh (every step as one would type it), a log file per step, and the run folders.

With --daily it does another thing: for each day of the log a model is trained up to that day and scored on the days
after it, once from scratch on all days so far and once by going on with the model of the day before. RUN/daily.json
holds AUC, GAUC, log loss and calibration by day and by age of the model, and CPU time (docs/daily.md).
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.fit ...")

import argparse
import pathlib

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.commands import add_overrides, exit_status
from gpsd_dist.fit.plan import DEFAULT_MODEL, make_plan


def main(argv: list[str]) -> int:
    """Returns 0; 2 for a mistake in options or data; 130 if stopped; else the status of the command that failed."""
    args = parse(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    # Plans once only to check every option, because what does the work takes seconds to import.
    make_plan(argparse.Namespace(**vars(args) | {"nproc": args.nproc or 1}), can_pretrain=True)
    from gpsd_dist.fit import daily, procedure

    daily.run(args) if args.daily else procedure.run(args)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(prog="python -m gpsd_dist.fit", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder that data_pipeline.build wrote")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for everything that is written")
    models_help = f"files of configs/model, like l4h64a4,hstu,din (default {DEFAULT_MODEL}, a Transformer)"
    parser.add_argument("--models", help=models_help)
    strategies_help = "of each model (default NT,ST_SF,FT_SF; with --daily one, by default FT_SF)"
    parser.add_argument("--strategies", help=strategies_help)
    parser.add_argument(
        "--budget_minutes", type=float, help="share so much time among the trainings (default: no limit)"
    )
    parser.add_argument("--nproc", type=int, help="processes of a training (default: one per GPU, or 2 on CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of all trainings (default 0)")
    parser.add_argument("--no_refit", action="store_true", help="do not train the chosen one again on train + valid")
    files = "instead of configs/stage/{}.gin; repeatable, the first may include"
    parser.add_argument("--gin_file", action="append", default=[], help=files.format("finetune"))
    parser.add_argument("--pretrain_gin_file", action="append", default=[], help=files.format("pretrain"))
    parser.add_argument("--daily", action="store_true", help="train to each day, score the days after it")
    parser.add_argument("--days", type=int, help="--daily: score the last N days (default: half of all)")
    parser.add_argument("--max_age", type=int, default=7, help="--daily: days that a model is scored on (default 7)")
    parser.add_argument(
        "--warm_epochs", type=int, default=1, help="--daily: passes over a new day by the model of before (default 1)"
    )
    args, rest = parser.parse_known_args(argv)
    args.strategies = args.strategies or ("FT_SF" if args.daily else "NT,ST_SF,FT_SF")
    add_overrides(parser, args, rest)
    if (args.nproc is not None and args.nproc < 1) or (args.budget_minutes is not None and args.budget_minutes <= 0):
        parser.error("--nproc must be at least 1, --budget_minutes above 0")
    if args.daily and ("," in f"{args.models}{args.strategies}" or args.no_refit):
        parser.error("--daily follows one model: one of --models, one of --strategies, and no --no_refit")
    if min(args.max_age, args.warm_epochs, 1 if args.days is None else args.days) < 1:
        parser.error("--days, --max_age and --warm_epochs must be at least 1")
    args.data, args.out = args.data.absolute(), args.out.absolute()
    return args


if __name__ == "__main__":
    sys.exit(run_main(main))

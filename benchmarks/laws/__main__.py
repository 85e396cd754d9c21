"""Shows which planted laws each model learns at the default options, beside what can be learnt at all.

    python -m benchmarks.laws                                          # everything, 3 seeds: some hours of one core
    python -m benchmarks.laws --laws match_category order --towers l1h32a4 din gbdt --strategies NT --seeds 0
    python -m benchmarks.laws --set_finetune DENSE_LR=5e-3 --set ModelConfig.init_std=0.0 --out_dir runs/laws_fan_in
    python -m benchmarks.laws --reduced                                # three laws, two models, with assertions

Writes OUT_DIR/results.json and table.md after each cell. A finished cell is kept while its options and its data are the
same. Exit status 1 if a cell failed, or under --reduced if a share is too small.
"""

import argparse
import collections.abc
import functools
import json
import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in every table of docs/; torch reads it when it is imported

from benchmarks.laws import dataset, generators, page, reduced, runs


def run_all(
    cells: list[runs.Cell],
    out_dir: pathlib.Path,
    prepared: collections.abc.Callable[[str], dataset.LawData],
    settings: runs.Settings,
) -> list[dict]:
    """Runs the cells in order on the data of `prepared`(law), prints a line and writes the tables after each."""
    records = []
    for cell in cells:
        made = prepared(cell.law)
        records.append(runs.run_cell(cell, made, out_dir, settings))
        print(_line(cell, records[-1]), flush=True)
        kept = [{key: value for key, value in record.items() if key != "configuration"} for record in records]
        (out_dir / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
        (out_dir / "table.md").write_text(page.markdown(records))
    return records


def _line(cell: runs.Cell, record: dict) -> str:
    if "failed" in record:
        return f"{cell}: failed: {record['failed']}"
    why_not = f"; {record['why_not']}" if record["why_not"] else ""
    auc, most = record["auc"], record["ceiling"]["test"]
    return (
        f"{cell}: share {record['share']:.3f}, test AUC {auc['test']:.4f} of {most:.4f}, valid {auc['valid']:.4f}, "
        f"steps to 0.9: {record['steps_to_near']}, {record['cpu_s']:.1f} s{why_not}"
    )


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laws", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    laws, towers = list(generators.LAWS), [*runs.BASELINES, *runs.TOWERS]
    parser.add_argument("--laws", nargs="+", choices=laws, default=laws)
    parser.add_argument(
        "--towers", nargs="+", default=towers, help="files of configs/model, and " + str(runs.BASELINES)
    )
    parser.add_argument(
        "--strategies", nargs="+", choices=("NT", "ST", "FT", "ST_SF", "FT_SF"), default=runs.STRATEGIES
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_users", type=int, default=dataset.NUM_USERS, help="half train, a quarter valid and test")
    parser.add_argument("--data_seed", type=int, default=0, help="of the logs; --seeds are of the models")
    parser.add_argument("--out_dir", type=pathlib.Path, default=pathlib.Path("runs/laws"))
    parser.add_argument("--data_root", type=pathlib.Path, help="folder of the logs; default: OUT_DIR/data")
    for name, where in (("--set", "both stages"), ("--set_pretrain", "pretraining"), ("--set_finetune", "finetuning")):
        parser.add_argument(name, nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=f"gin, {where}")
    parser.add_argument("--collect", action="store_true", help="run nothing; a table of all finished cells of OUT_DIR")
    parser.add_argument("--reduced", action="store_true", help=reduced.__doc__.splitlines()[0])
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    out_dir = args.out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        if args.collect:
            print(page.markdown(runs.finished(out_dir)))
            return 0
        if args.reduced:
            args.num_users, cells = reduced.NUM_USERS, reduced.cells()
        else:
            cells = runs.cells(args.laws, args.towers, args.strategies, args.seeds)
        data_root = (args.data_root or out_dir / "data").resolve()
        settings = runs.Settings(tuple(args.set), tuple(args.set_pretrain), tuple(args.set_finetune))
        prepared = functools.cache(lambda law: dataset.prepare(law, data_root, args.num_users, seed=args.data_seed))
        records = run_all(cells, out_dir, prepared, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{page.markdown(records)}\nwritten to {out_dir / 'results.json'} and table.md")
    problems = reduced.problems(records) if args.reduced else []
    print(*problems, sep="\n")
    return int(bool(problems) or any("failed" in record for record in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

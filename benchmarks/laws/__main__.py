"""Prepares the planted laws and prints their ceilings: `python -m benchmarks.laws --out_dir runs/laws`."""

import argparse
import pathlib
import sys

from benchmarks.laws import dataset, generators


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laws", description=__doc__, allow_abbrev=False)
    parser.add_argument("--laws", nargs="+", choices=generators.LAWS, default=list(generators.LAWS))
    parser.add_argument("--out_dir", type=pathlib.Path, default=pathlib.Path("runs/laws"))
    parser.add_argument("--num_users", type=int, default=dataset.NUM_USERS, help="half train, a quarter valid and test")
    args = parser.parse_args(argv)
    for law in args.laws:
        made = dataset.prepare(law, args.out_dir / "data", args.num_users)
        ends = [f"{split} {dataset.ceiling(made, split):.4f}" for split in ("valid", "test")]
        print(f"{law:15} ceiling {', '.join(ends)}; explicit feature, test {dataset.explicit_auc(made, 'test'):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Checks whether two commits compute the same bits: `python -m benchmarks.same_bits OLD [NEW]` trains a set of tiny
runs with the code of each commit on this machine, and prints every tensor, metric and data file that differs.

    python -m benchmarks.same_bits main                     # main against the working tree
    python -m benchmarks.same_bits 14e4532 HEAD --keep /tmp/bits

Runs: CASES x {1, 2 ranks} x {plain, sparse_dist}. Compared: the data set that each commit builds, every tensor of the
last checkpoint (read by torch's own reader, not by ours), every line of metrics.jsonl without times, and the scores of
the test split. Hashes are valid on one machine only, because processors round differently: compare on one machine,
never commit a hash as truth. A commit that renames a tensor or a metric shows it as missing on one side.

Exit status: 0 the same, 1 something differs, 2 a run failed.
"""

import argparse
import hashlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import typing

_PRETRAIN = (
    "--gin_file=configs/experiments/quickstart_pretrain.gin",
    "--gin.GLOBAL_BATCH_ROWS=32",
    "--gin.PretrainConfig.num_negatives=32",
)
_FINETUNE = ("--gin_file=configs/experiments/quickstart_finetune.gin", "--gin.GLOBAL_BATCH_ROWS=32")
_STEPS = 9
_COMMON = (
    "--gin_file=configs/model/l1h32a4.gin",
    "--gin.EMBEDDING_DIM=16",
    f"--gin.TrainConfig.max_steps={_STEPS}",
    "--gin.TrainConfig.log_interval_steps=1",
    "--gin.TrainConfig.save_interval_steps=4",
    "--gin.TablesConfig.small_table_max_rows=20",
)
Case = tuple[str, tuple[str, ...]]
CASES: dict[str, Case] = {
    "pretrain": ("plain", _PRETRAIN),
    "pretrain_micro_batches": ("plain", (*_PRETRAIN, "--gin.TrainConfig.micro_batches=2")),
    "pretrain_per_position": ("plain", (*_PRETRAIN, "--gin.PretrainConfig.negatives_per=position")),
    "nt": ("plain", _FINETUNE),
    "st_sf_micro_batches": ("plain", (*_FINETUNE, "--gin.STRATEGY=ST_SF", "--gin.TrainConfig.micro_batches=2")),
    "ft_dropout": ("plain", (*_FINETUNE, "--gin.STRATEGY=FT", "--gin.DROPOUT=0.2")),
    "hstu": ("plain", (*_FINETUNE, "--gin_file=configs/model/hstu.gin")),
    "dien": (
        "plain",
        (*_FINETUNE, "--gin_file=configs/model/dien.gin", "--gin.FinetuneConfig.next_behaviour_weight=1.0"),
    ),
    "hashed": ("hashed", _PRETRAIN),
    "managed": ("managed", _PRETRAIN),
}
"""Name -> (which data set, options). A case with a strategy starts from `pretrain` of one rank, the plain loop."""
PIPELINES = ("plain", "sparse_dist")
WITHOUT_PREFETCH = ("managed",)  # the rows of a managed table are known in their step only
DATA = {  # more options of data_pipeline.build
    "plain": (),
    "hashed": ("--hashed_features", "item:400"),
    "managed": ("--managed_features", "item:120"),
}
_TIMES = ("perf/", "time")  # metrics that are about time and memory, not about numbers
_UNEQUAL_FIELDS = (
    "command",
    "created",
    "raw_dir",
    "out_dir",
    "sources",
    "build",
)  # of a manifest: paths, times, commit

Hashes = dict[str, str]


def main(argv: list[str]) -> int:
    """Returns the exit status that the module's docstring lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="commit, branch or tag")
    parser.add_argument("new", nargs="?", default="", help="the same; default: the working tree as it is")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the hashes of commits, which are then reused")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--worlds", nargs="*", type=int, default=[1, 2], help="numbers of ranks")
    args = parser.parse_args(argv)
    try:
        old, new = (hashes_of(revision, args) for revision in (args.old, args.new))
    except subprocess.CalledProcessError as error:
        print(f"error: status {error.returncode} from {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 2
    different = differences(old, new)
    print("\n".join(different))
    runs = len({name.split(":")[0] for name in old | new})
    print(
        f"bits: {len(different)} of {len(old | new)} values of {runs} runs and data sets differ"
        if different
        else f"bits: same ({len(old)} values of {runs} runs and data sets)"
    )
    return 1 if different else 0


def differences(old: Hashes, new: Hashes) -> list[str]:
    """Lists every name that is missing on one side or has another hash."""
    lines = []
    for name in sorted(old | new):
        if name not in new:
            lines.append(f"only in the old commit: {name}")
        elif name not in old:
            lines.append(f"only in the new commit: {name}")
        elif old[name] != new[name]:
            lines.append(f"differs: {name}")
    return lines


def hashes_of(revision: str, args: argparse.Namespace) -> Hashes:
    """Checks the revision out into a folder of its own ('' stands for the working tree) and runs everything there."""
    root = pathlib.Path(_git("rev-parse", "--show-toplevel"))
    if not revision:
        return _run_all(root, args)
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    settings = json.dumps([_machine(), sorted(args.cases), sorted(args.worlds), CASES, _COMMON, DATA])
    kept = args.keep / f"{commit[:12]}-{_sha(settings.encode())[:12]}.json" if args.keep else None
    if kept and kept.exists():
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory(prefix="same_bits_") as folder:
        tree = pathlib.Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            hashes = _run_all(tree, args)
        finally:
            _git("worktree", "remove", "--force", str(tree))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(hashes, indent=0))
    return hashes


def _run_all(tree: pathlib.Path, args: argparse.Namespace) -> Hashes:
    """Builds data sets, then runs all cases in one process per number of ranks, because importing torch takes longer
    than a run.
    """
    with tempfile.TemporaryDirectory(prefix="same_bits_runs_") as folder:
        runs = pathlib.Path(folder)
        _python(
            tree,
            runs,
            "-m",
            "data_pipeline.synthesize",
            "--out_dir",
            "raw",
            "--num_users",
            "120",
            "--num_items",
            "1600",
            "--requests_per_day",
            "60",
        )
        for name in {CASES[case][0] for case in args.cases} | {"plain"}:
            build = (
                "-m",
                "data_pipeline.build",
                "--source",
                "synthetic",
                "--raw_dir",
                "raw",
                "--out_dir",
                f"data_{name}",
            )
            _python(tree, runs, *build, "--threads", "1", *DATA[name])
        # Ranks draw different negatives, so two ranks are another run than one; each number has its own hashes.
        _python(tree, runs, __file__, "--inside", "1", "pretrain")  # what the strategies start from
        (runs / "runs" / "1" / "plain" / "pretrain").rename(runs / "source")
        for world in args.worlds:
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world))
            _python(tree, runs, *(launcher if world > 1 else ()), __file__, "--inside", str(world), *args.cases)
        return _hash_data(runs) | _hash_runs(runs)


def _inside(world: str, cases: list[str]) -> None:
    """Runs inside a child: trains the cases with the code that is on its path, in the folder of the runs."""
    import torch.distributed as dist

    from gpsd_dist import evaluate, train

    if int(world) > 1:  # ranks cannot meet a second time at torchrun's store: one group serves all cases
        dist.init_process_group("gloo")
        dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None
    tree, runs = pathlib.Path(os.environ["SAME_BITS_TREE"]), pathlib.Path.cwd()
    os.chdir(tree)  # the names of configuration files are relative
    for pipeline in PIPELINES:
        for case in cases:
            data, options = CASES[case]
            if case in WITHOUT_PREFETCH and pipeline != "plain":
                continue
            output = runs / "runs" / world / pipeline / case
            source = (f"--gin.INIT_CHECKPOINT={runs / 'source'}",) if any("STRATEGY" in o for o in options) else ()
            status = train.main([
                *options, *_COMMON, *source, f"--gin.DATA_DIR={runs / f'data_{data}'}", f"--gin.OUTPUT_DIR={output}",
                f"--gin.ExecutionConfig.pipeline={pipeline}",
            ])  # fmt: skip
            if status:
                sys.exit(f"error: {case} with {world} ranks, {pipeline}: status {status}")
            if world == "1" and pipeline == "plain":
                arguments = ["--checkpoint", str(output), "--split", "valid" if "pretrain" in case else "test"]
                status = evaluate.main([*arguments, "--metrics_out", str(output / "scores.json")])
                if status:
                    sys.exit(f"error: evaluating {case}: status {status}")


def _hash_data(runs: pathlib.Path) -> Hashes:
    hashes = {}
    for path in sorted(runs.glob("data_*/**/*")):
        place = re.sub("/versions/[^/]*", "", str(path.relative_to(runs)))  # older commits have no versions
        name = f"{path.relative_to(runs).parts[0]}: {place}"
        if path.suffix == ".parquet":
            hashes[name] = _sha(path.read_bytes())
        elif path.name == "manifest.json":
            fields = json.loads(path.read_text())
            for option in ("raw_dir", "fingerprint"):  # the latter is one of the pipeline's own code, too
                fields["options"].pop(option, None)
            for field in set(fields) - set(_UNEQUAL_FIELDS):
                hashes[f"{name} {field}"] = _sha(json.dumps(fields[field]).encode())
    return hashes


def _hash_runs(runs: pathlib.Path) -> Hashes:
    import torch.distributed.checkpoint as dcp

    hashes = {}
    for metrics in sorted(runs.glob("runs/*/*/*/metrics.jsonl")):
        run = metrics.parent
        name = "/".join(run.relative_to(runs).parts[1:])
        last = max((run / "checkpoints").glob("step_*[0-9]"))
        reader = dcp.FileSystemReader(last)
        saved = reader.read_metadata().state_dict_metadata
        tensors = {key: _empty(value) for key, value in saved.items()}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        for key, tensor in tensors.items():
            hashes[f"{name}: {last.name} {key}"] = _sha(str(tensor.dtype).encode() + tensor.numpy().tobytes())
        for number, line in enumerate(metrics.read_text().splitlines()):
            for key, value in json.loads(line).items():
                if not any(word in key for word in _TIMES):
                    hashes[f"{name}: metrics line {number} {key}"] = json.dumps(value)
        if (run / "scores.json").exists():
            hashes[f"{name}: scores"] = (run / "scores.json").read_text()
    return hashes


def _empty(saved: typing.Any) -> typing.Any:
    import torch

    return torch.empty(saved.size, dtype=saved.properties.dtype)


def _machine() -> str:
    return f"{platform.processor()} {platform.python_version()} {os.environ.get('ATEN_CPU_CAPABILITY', '')}"


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _python(tree: pathlib.Path, runs: pathlib.Path, *arguments: str) -> None:
    """Runs Python in the folder of the runs with the code of the tree; its output is shown where it fails."""
    environment = os.environ | {"PYTHONPATH": str(tree), "SAME_BITS_TREE": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=runs, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace")[-4000:])
        raise subprocess.CalledProcessError(done.returncode, command)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        _inside(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1:]))

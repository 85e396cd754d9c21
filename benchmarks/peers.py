"""Trains real peers and the product on the same Grocery samples, by turns, and compares samples per CPU second.

    python -m benchmarks.peers --official DIR [--deepctr] [--seconds 60] [--data_root data]

DIR is a checkout of the authors' code (github.com/chqiwang/gpsd-rec). It runs as it is: its own `src/train.py` with a
gin file of its own form, one thread, no loader processes; its steps are read from its log and its CPU seconds from the
operating system. `--deepctr` adds DIN of DeepCTR-Torch against the product's DIN. Without `--official`,
`padded_baseline.py` stands in, and is named so. Every peer gets an environment of its own below `--env_dir`: this
interpreter's torch, and pinned packages on top. Each peer runs twice, by glibc's default and with freed memory kept.

A sample is a history in pretraining and a (history, candidate) pair in ranking. Between two turns a peer is stopped by
SIGSTOP, and whole steps alone count.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import typing

import rich.console

from benchmarks.compare import batch_rows
from benchmarks.datasets import BenchData, prepare
from benchmarks.padded_baseline import PaddedLoader
from benchmarks.remote import Remote
from benchmarks.sides import SIZES, SideSpec, Size
from benchmarks.tables import Table

# Versions that ran with the pinned torch; the official code names none but torch's.
_PINS = {
    "official": ("loguru==0.7.3", "torcheval==0.0.7", "adamw_bf16==0.0.3"),
    "deepctr": ("deepctr-torch==0.3.0",),
}
_KEPT = {"MALLOC_TRIM_THRESHOLD_": str(1 << 62), "MALLOC_MMAP_MAX_": "0"}  # what `distributed.allocator` sets for us
_STEP = {"official": re.compile(r"global_step: (\d+)/"), "deepctr": re.compile(r"^step (\d+)$")}
_BATCH = 512
_ROOT = pathlib.Path(__file__).resolve().parents[1]


class Turn(typing.NamedTuple):
    """Holds what one side did in its turn."""

    samples: float
    cpu_s: float


class Side(typing.Protocol):
    """Trains in turns."""

    def turn(self, seconds: float) -> Turn:
        """Trains for about so many CPU seconds."""

    def close(self) -> None:
        """Ends the process."""


class Stranger:
    """Meters a program that knows nothing of us: steps from the lines it prints, CPU seconds from /proc."""

    def __init__(self, command: list[str], cwd: pathlib.Path, environment: dict[str, str], step: re.Pattern[str]):
        self._step, self._said = step, collections.deque[str](maxlen=40)
        base = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", *_KEPT)}
        base |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        # stderr shares the pipe: a peer that fails must say why.
        self.process = subprocess.Popen(command, cwd=cwd, env=base | environment, text=True, bufsize=1,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        self._last = self._next_step()  # the first steps tune and allocate
        self._last = self._next_step()
        self._stop()

    def turn(self, seconds: float) -> Turn:
        """Runs from one printed step to a later one; what a stop cuts off belongs to the next turn."""
        self.process.send_signal(signal.SIGCONT)
        step, begin_s = self._last
        now, cpu_s = self._next_step()
        while cpu_s - begin_s < seconds:
            now, cpu_s = self._next_step()
        self._stop()
        self._last = now, cpu_s
        return Turn(_BATCH * (now - step), cpu_s - begin_s)

    def close(self) -> None:
        """Ends the process, which may be stopped."""
        self.process.kill()
        self.process.wait()

    def _stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until it stands still

    def _next_step(self) -> tuple[int, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.append(line)
            if found := self._step.search(line):
                return int(found[1]), self._cpu_s()
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}; it said:\n{''.join(self._said)}")

    def _cpu_s(self) -> float:
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(value) for value in fields[11:15]) / os.sysconf("SC_CLK_TCK")  # its own, and ended children's


class Ours:
    """Runs a side of `benchmarks.sides`: the product, or the stand-in of the official code."""

    def __init__(self, spec: SideSpec, samples_per_row: int):
        self._remote, self._samples = Remote(spec), spec.batch_rows * samples_per_row
        self._remote.block(1)
        self._step_s = self._remote.block(1).cpu_s

    def turn(self, seconds: float) -> Turn:
        """Trains whole steps."""
        block = self._remote.block(max(1, round(seconds / self._step_s)))
        return Turn(self._samples * block.num_steps, block.cpu_s)

    def close(self) -> None:
        """Ends the process."""
        self._remote.close()


def environment_of(peer: str, env_dir: pathlib.Path) -> str:
    """Makes the peer's environment, unless it is there, and returns its Python: our torch, its own pinned packages."""
    folder = env_dir / peer
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        paths = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                               capture_output=True, text=True)  # fmt: skip
        (pathlib.Path(paths.stdout.strip()) / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *_PINS[peer]], check=True)
        (folder / "done").touch()
    return str(python)


def write_official_samples(data: BenchData, folder: pathlib.Path) -> None:
    """Writes the rows in the form of the official code: samples.txt, item2index.txt, cate2index.txt.

    In pretraining the last event is the official target, with label 2; in ranking every candidate is a line.
    """
    loader = PaddedLoader(data.data_dir, data.manifest, data.split, batch_rows=1)
    for name, file in (("item", "item2index.txt"), ("category", "cate2index.txt")):
        rows = range(2, data.manifest.table(name).num_rows)
        (folder / file).write_text("".join(f"{row},{row - 1}\n" for row in rows))
    with (folder / "samples.txt").open("w") as file:
        for number, row in enumerate(loader.rows):
            events = list(zip(row["history.item"], row["history.category"], strict=True))
            targets = [(*events.pop(), 2)]
            if "candidate.item" in row:
                events.append(targets[0][:2])
                columns = row["candidate.item"], row["candidate.category"], row["label.click"]
                targets = [(item, category, int(label)) for item, category, label in zip(*columns, strict=True)]
            history = ";".join(f"item__item_id:{item}#item__cate_id:{category}" for item, category in events)
            for item, category, label in targets:
                file.write(f"{number},{item},{category},{label},{history},{len(events)}\n")


def official_config(is_pretraining: bool, folder: pathlib.Path) -> str:
    """Returns the gin file: that of config/amazon_food/l4h64a4*.gin with our paths, without evaluation or processes."""
    return f"""
train.data_path = "{folder}/samples.txt"
train.ckpt_root_dir = "{folder}/output"
train.batch_size = {_BATCH}
train.num_data_workers = 0
train.prefetch_factor = None
train.epoch = 100000
train.learning_rate = 5e-3
train.min_learning_rate = 5e-4
train.warmup_steps = 500
train.max_grads_norm = 1.0
train.weight_decay = 0.1
train.restore = False
train.eval_steps = 0
train.log_steps = {1 if is_pretraining else 5}
eval.data_path = None
ItemTokenizer.table_path = "{folder}/item2index.txt"
CateTokenizer.table_path = "{folder}/cate2index.txt"
SeqRecDataset.max_seq_len = 50
ModelArgs.item_ar_loss_weight = {int(is_pretraining)}
ModelArgs.cate_ar_loss_weight = {int(is_pretraining)}
ModelArgs.rank_loss_weight = {int(not is_pretraining)}
ModelArgs.dim = 64
ModelArgs.n_layers = 4
"""


def official(checkout: pathlib.Path, python: str, data: BenchData, folder: pathlib.Path, keeps: bool) -> Side:
    """Starts the official training."""
    folder.mkdir()
    write_official_samples(data, folder)
    (folder / "bench.gin").write_text(official_config(data.split == "pretrain", folder))
    command = [python, "src/train.py", "--config", str(folder / "bench.gin")]
    return Stranger(command, checkout.resolve(), _KEPT if keeps else {}, _STEP["official"])


def deepctr(python: str, data: BenchData, folder: pathlib.Path, keeps: bool) -> Side:
    """Starts DIN of DeepCTR-Torch on the rows of the official form."""
    folder.mkdir()
    write_official_samples(data, folder)
    command = [python, str(_ROOT / "benchmarks" / "peer_deepctr.py"), str(folder), str(_BATCH)]
    return Stranger(command, folder, _KEPT if keeps else {}, _STEP["deepctr"])


def compare(sides: dict[str, Side], seconds: float, rounds: int) -> dict[str, list[Turn]]:
    """Lets the sides take turns."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            turns[name].append(side.turn(seconds / rounds))
    return turns


def ratios(peer: list[Turn], ours: list[Turn]) -> list[float]:
    """Divides our samples per CPU second by the peer's, turn by turn."""
    return [(o.samples / o.cpu_s) / (p.samples / p.cpu_s) for p, o in zip(peer, ours, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Duel:
    kind: str
    peer: str
    size: Size  # of the product
    start: typing.Callable[[BenchData, pathlib.Path, bool], Side]  # (data, folder, keeps freed memory)


def _duels(args: argparse.Namespace) -> typing.Iterator[_Duel]:
    peer, start = "stand-in of the official code (padded_baseline.py)", _stand_in
    if args.official:
        python = environment_of("official", args.env_dir)
        peer, start = "official code", functools.partial(official, args.official, python)
    for kind in filter(None, args.kinds.split(",")):
        yield _Duel(kind, peer, SIZES["h64"], start)
    if args.deepctr:
        start = functools.partial(deepctr, environment_of("deepctr", args.env_dir))
        yield _Duel("discriminative", "DeepCTR-Torch 0.3.0, DIN", Size(1, 64, 1, "din"), start)


def _stand_in(data: BenchData, folder: pathlib.Path, keeps: bool) -> Side:
    size, variant = SIZES["h64"], "baseline + kept memory" if keeps else "baseline"
    spec = SideSpec(variant, data, size, batch_rows(data, size, is_baseline=True), folder)
    return Ours(spec, _samples_per_row(data))


def _samples_per_row(data: BenchData) -> int:
    """Counts a history as one sample in pretraining, and its candidates in ranking."""
    split = data.manifest.split(data.split)
    return split.num_candidates // split.num_rows or 1


def measure(duel: _Duel, args: argparse.Namespace, scratch: pathlib.Path) -> typing.Iterator[tuple[str, ...]]:
    """Yields a row of the table for each way of treating freed memory."""
    data = prepare(duel.kind, "grocery", args.data_root, scratch)
    for keeps in (False, True):
        folder = scratch / f"{duel.kind}-{duel.size.model}-{keeps}"
        spec = SideSpec("product", data, duel.size, data.source.batch_rows, folder.with_suffix(".ours"))
        with contextlib.ExitStack() as stack:
            peer = duel.start(data, folder, keeps)
            stack.callback(peer.close)
            ours = Ours(spec, _samples_per_row(data))
            stack.callback(ours.close)
            turns = compare({"peer": peer, "ours": ours}, args.seconds, args.rounds)
        found = ratios(turns["peer"], turns["ours"])
        speeds = (statistics.median(turn.samples / turn.cpu_s for turn in turns[name]) for name in ("peer", "ours"))
        kept = "kept" if keeps else "given back (default)"
        spread = f"{min(found):.1f} - {max(found):.1f} ({len(found)})"
        yield (duel.kind, duel.peer, kept, *(f"{s:,.0f}" for s in speeds), f"{statistics.median(found):.1f}x", spread)


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--official", type=pathlib.Path, help="checkout of github.com/chqiwang/gpsd-rec")
    parser.add_argument("--deepctr", action="store_true", help="also DIN of DeepCTR-Torch")
    parser.add_argument(
        "--kinds",
        default="pretrain,discriminative,discriminative_k2",
        help="what is trained; '' with --deepctr: DIN alone",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds per side and row")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--data_root", type=pathlib.Path, default=pathlib.Path("data"), help="holds grocery/")
    parser.add_argument("--env_dir", type=pathlib.Path, default=pathlib.Path(".peers"), help="environments of peers")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the table as Markdown")
    args = parser.parse_args(argv)
    if args.official and not (args.official / "src" / "train.py").is_file():
        parser.error(f"--official {args.official} has no src/train.py; clone github.com/chqiwang/gpsd-rec there")
    table = Table("Samples per CPU second", ("what", "peer", "freed memory", "peer", "product", "ratio", "min - max"))
    with tempfile.TemporaryDirectory(prefix="gpsd-peers-") as scratch:
        for duel in _duels(args):
            for row in measure(duel, args, pathlib.Path(scratch)):
                print("  ".join(row), flush=True)
                table.add(*row)
    rich.console.Console(width=200).print(table.rich())
    if args.markdown:
        args.markdown.write_text(table.markdown() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

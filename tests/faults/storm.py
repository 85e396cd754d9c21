"""`python -m tests.faults.storm [--moments 52] [--seed N]`: kill -9 at random moments of trainings, builds and exports.

Every moment is a point in time, drawn from as long as the work takes undisturbed, and not a place in the code. After
each kill, what was there before is whole, or what is new. The work is then begun again, and at its end everything has
the bits of work that nobody disturbed. The last line counts the moments.
"""

import argparse
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing

from data_pipeline import build, validate
from gpsd_dist.data import data_versions
from gpsd_dist.serving import artefact
from tests.faults.jobs import ROOT, Run, Workshop, finish
from tests.unit.data_pipeline.test_kills import content, first_builds
from tests.unit.serving.test_artefact import write

_LATEST = 1.05  # of the time that the undisturbed work takes


def _forked(work: typing.Callable[[], object], kill_after_s: float | None = None) -> tuple[float, bool]:
    """(seconds, whether it was killed) of `work` in a process of its own, without its output."""
    begin_s = time.monotonic()
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        try:
            os._exit(1 if work() not in (0, None) else 0)
        except BaseException:
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed by itself"
    return time.monotonic() - begin_s, os.WIFSIGNALED(status)


def _rows(target: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """All files of the current version but the manifest, which has the command and the time in it."""
    return {p: value for p, value in content(data_versions.current(target)).items() if p.name != "manifest.json"}


def builds(folder: pathlib.Path, moments: int, choose: random.Random, scenario: str) -> int:
    """Kills of a build or an append. Returns how many hit it while it was at work."""
    target, arguments = first_builds(folder, scenario)
    shutil.copytree(target, folder / "kept")
    before = _rows(target)
    taken_s, _ = _forked(lambda: build.main(arguments))
    after, hits = _rows(target), 0
    while hits < moments:
        shutil.rmtree(target)
        shutil.copytree(folder / "kept", target)
        _, is_killed = _forked(lambda: build.main(arguments), choose.uniform(0, _LATEST * taken_s))
        hits += is_killed
        validate.check(target)
        assert _rows(target) in (before, after)
        _forked(lambda: build.main([word for word in arguments if word != "--force"]))
        assert _rows(target) == after and not list((target / "versions").glob(".*"))
    return hits


def exports(folder: pathlib.Path, moments: int, choose: random.Random) -> int:
    """Kills of an export. Returns how many hit it while it was at work."""
    root, hits = folder / "ctr", 0
    write(root)
    taken_s, _ = _forked(lambda: write(root, "undisturbed") and None)

    def checked() -> str:
        found = artefact.open_version(root)
        found.check_hashes()
        return str(found.read_json("model.json")["note"])

    while hits < moments:
        before, note = checked(), f"moment {hits}"
        _, is_killed = _forked(lambda note=note: write(root, note) and None, choose.uniform(0, _LATEST * taken_s))
        hits += is_killed
        assert checked() in (before, note)
        _forked(lambda: write(root, "next") and None)
        assert checked() == "next" and not list(root.glob(".partial-*"))
    return hits


def trainings(folder: pathlib.Path, moments: int, choose: random.Random) -> int:
    """Kills launcher and ranks of a job of two ranks together. Returns how many hit it while it was at work."""
    workshop, hits, number = Workshop(folder), 0, 0
    begin_s = time.monotonic()
    workshop.reference.check_equals_reference()
    taken_s = time.monotonic() - begin_s
    while hits < moments:
        run, number = Run(workshop, f"storm_{number}"), number + 1
        while hits < moments:
            job = run.start()
            try:
                job.wait(choose.uniform(0.4, _LATEST) * taken_s)
                break  # it has ended before
            except subprocess.TimeoutExpired:
                hits += 1
                for pid in [job.pid, *_children(job.pid)]:
                    os.kill(pid, signal.SIGKILL)
                finish(job)
        ended = run.train()
        assert ended.status == 0, ended.stderr
        run.check_equals_reference()
    return hits


def _children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=52)
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: another each time"
    )
    parser.add_argument("--only", choices=("trainings", "builds", "appends", "exports"))
    args = parser.parse_args(argv)
    each = -(-args.moments // 4)
    storms = {
        "exports": exports,
        "builds": lambda *given: builds(*given, "replace"),
        "appends": lambda *given: builds(*given, "append"),
        "trainings": trainings,
    }
    survived = 0
    for name, storm in storms.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(prefix=f"storm_{name}_") as folder:
                begin_s = time.monotonic()
                survived += storm(pathlib.Path(folder), each, random.Random(f"{args.seed} {name}"))
                print(f"{name}: {each} moments survived ({time.monotonic() - begin_s:.0f} s)", flush=True)
    print(f"{survived} moments of seed {args.seed}, {survived} survived")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))

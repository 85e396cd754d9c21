"""Measures how large a log one machine prepares within a stated memory limit: time, memory and spilled bytes.

    python -m benchmarks.large_build --num_events 100_000_000 --memory_limit 4GB --work_dir /tmp/large

Draws a synthetic log of that size (`data_pipeline.synthesize`), builds it (`data_pipeline.build`), each in a process of
its own, and prints one JSON line for each: wall and CPU seconds, the peak resident memory of the process, and for the
build the largest size of the engine's spill folder and of its stored tables. The work folder is removed at the end.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import time

import psutil

EVENTS_PER_USER, POLL_S = 45, 0.5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num_events", type=int, default=100_000_000, help="behaviours, about; exposures: 1 in 20")
    parser.add_argument("--num_items", type=int, default=1_000_000)
    parser.add_argument("--memory_limit", default="4GB", help="of the engine")
    parser.add_argument("--work_dir", type=pathlib.Path, required=True, help="a folder that does not exist")
    parser.add_argument("--timeout_s", type=float, default=1500, help="for both steps together")
    options = parser.parse_args(argv)
    if options.work_dir.exists():
        sys.stderr.write(f"error: --work_dir {options.work_dir} exists; it would be removed: choose another\n")
        return 2
    deadline = time.monotonic() + options.timeout_s
    raw, out = options.work_dir / "raw", options.work_dir / "out"
    sizes = {
        "num_users": max(options.num_events // EVENTS_PER_USER, 1),
        "num_items": options.num_items,
        "requests_per_day": max(options.num_events // 20 // 4 // 7, 1),
    }
    draw = ["data_pipeline.synthesize", "--out_dir", raw, *(word for k, v in sizes.items() for word in (f"--{k}", v))]
    build = ["data_pipeline.build", "--source", "synthetic", "--raw_dir", raw, "--out_dir", out]
    build += ["--memory_limit", options.memory_limit, "--compression", "lz4"]
    try:
        options.work_dir.mkdir(parents=True)
        for name, words in (("draw", draw), ("build", build)):
            figures = {"step": name, **measure([str(word) for word in words], options.work_dir, deadline)}
            sys.stdout.write(json.dumps(figures | {"log_bytes": size_of(raw), "out_bytes": size_of(out)}) + "\n")
            sys.stdout.flush()
            if figures["exit_status"]:
                return 1
    finally:
        shutil.rmtree(options.work_dir, ignore_errors=True)
    return 0


def measure(words: list[str], work_dir: pathlib.Path, deadline: float) -> dict:
    """Runs `python -m words` until it ends or the deadline (time.monotonic) comes; sizes are sampled."""
    started = time.monotonic()
    with (work_dir / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=subprocess.STDOUT)
    watched = psutil.Process(process.pid)
    peak = {"peak_rss_bytes": 0, "peak_spill_bytes": 0, "peak_stored_bytes": 0}
    cpu_s = 0.0
    while process.poll() is None and time.monotonic() < deadline:
        try:
            family = [watched, *watched.children(recursive=True)]
            found = sum(member.memory_info().rss for member in family)
            cpu_s = sum(sum(member.cpu_times()[:2]) for member in family)
        except psutil.NoSuchProcess:
            break
        scratch = next(work_dir.glob("out/versions/.building/.pipeline-scratch-*"), work_dir / "none")
        sizes = {"peak_rss_bytes": found, "peak_spill_bytes": size_of(scratch / "spill")}
        sizes["peak_stored_bytes"] = size_of(scratch) - sizes["peak_spill_bytes"]
        peak = {name: max(peak[name], size) for name, size in sizes.items()}
        time.sleep(POLL_S)
    is_late = process.poll() is None and time.monotonic() >= deadline
    if is_late:
        process.terminate()
    status = process.wait()
    if status:
        sys.stderr.write("".join((work_dir / "log.txt").read_text().splitlines(keepends=True)[-15:]))
    wall_s = round(time.monotonic() - started, 1)
    return {"exit_status": status, "is_late": is_late, "wall_s": wall_s, "cpu_s": round(cpu_s, 1), **peak}


def size_of(folder: pathlib.Path) -> int:
    """Adds up the bytes of all files below the folder; 0 if there is none. Files that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


if __name__ == "__main__":
    sys.exit(main())

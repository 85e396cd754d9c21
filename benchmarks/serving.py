"""Measures serving: CPU per request by phase, cold start, memory, load by MLPerf's rules, overload, reloads.

    python -m benchmarks.serving --artefact artefacts/ctr --scenario Server --history 200 --candidates 500 --qps 25

Scenarios: Server and Offline (LoadGen's own summary), cost, passes (shared, or one per candidate), start, overload,
reload (a soak is one that lasts long).
Times of a busy machine are those of its other work too: CPU times are what to compare, and the machine's load is
printed with every figure. Prints one JSON object at the end.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing

import msgspec
import numpy as np
import psutil

from benchmarks.open_loop import Sample, percentile_ms, poisson_times, send_at
from benchmarks.serving_loadgen import in_process, over_http, summary
from benchmarks.serving_requests import bodies, make_requests
from gpsd_dist.serving import load
from gpsd_dist.serving.artefact import VERSIONS, make_current

_REPEATS = 5
_START_S = 300
_HEAD_BYTES = 200  # of an answer: enough for its version


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--artefact", type=pathlib.Path, required=True)
    parser.add_argument("--scenario", choices=("Server", "Offline", *SCENARIOS), required=True)
    parser.add_argument("--over", choices=("http", "process"), default="http")
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--qps", type=float, default=25.0, help="requests a second; of overload: the capacity")
    parser.add_argument("--latency_ms", type=float, default=80.0, help="target of Server, deadline of the others")
    parser.add_argument("--duration_s", type=float, default=30.0)
    parser.add_argument("--batch_tokens", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--history_cache_mib", type=float, default=0.0, help="of the scorer or server (default: none)")
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args(argv)
    before = os.getloadavg()[0]
    measured = by_loadgen(args) if args.scenario in ("Server", "Offline") else SCENARIOS[args.scenario](args)
    measured |= {"scenario": args.scenario, "history": args.history, "candidates": args.candidates}
    measured |= {"machine_load": [round(before, 1), round(os.getloadavg()[0], 1)], "cores": os.cpu_count()}
    print(json.dumps(measured, indent=1))
    if args.out:
        args.out.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


# ---- LoadGen --------------------------------------------------------------------------------------------------------


def by_loadgen(args: argparse.Namespace) -> dict[str, typing.Any]:
    """Prints LoadGen's summary; returns what is in it."""
    asked = _bodies(args)
    options = {"qps": args.qps, "latency_ms": args.latency_ms, "duration_s": args.duration_s}
    with contextlib.ExitStack() as stack:
        if args.over == "process":
            issue = stack.enter_context(in_process(load(args.artefact, threads=1), args.batch_tokens))
        else:
            _, port = stack.enter_context(server(args, "--deadline_ms", 10**6, "--queue_tokens", 10**9))
            issue = stack.enter_context(over_http("127.0.0.1", port))
        text, failed = summary(args.scenario, asked, issue, **options)
    print(text)
    found = dict(re.findall(r"^(.+?)\s*: (.+)$", text, re.MULTILINE))
    kept = {name: value for name, value in found.items() if re.search(r"Result is|latency|per second|qps", name)}
    return {"loadgen": kept, "failed": failed, "over": args.over}


# ---- one request, one start -----------------------------------------------------------------------------------------


def cost(args: argparse.Namespace) -> dict[str, typing.Any]:
    """CPU milliseconds of one request alone: by phase in process, and of the server process over HTTP."""
    asked = _bodies(args)
    if args.over == "http":
        with server(args, "--deadline_ms", 10**6) as (process, port):
            return {"server_cpu_ms": _spread([_server_cost(process, port, asked) for _ in range(_REPEATS)])}
    scorer, runs = load(args.artefact, threads=1, history_cache_mib=args.history_cache_mib), []
    for _ in range(_REPEATS + 1):  # the first one warms up
        phases: dict[str, float] = {}

        def add(phase: str, seconds: float, phases: dict[str, float] = phases) -> None:
            phases[phase] = phases.get(phase, 0.0) + seconds * 1000 / len(asked)

        for body in asked:
            _score_once(scorer, body, add)
        runs.append(phases)
    return {f"{phase}_cpu_ms": _spread([run[phase] for run in runs[1:]]) for phase in runs[0]}


def passes(args: argparse.Namespace) -> dict[str, typing.Any]:
    """CPU milliseconds of one pass for all candidates of a request, and of a pass for each of them."""
    scorer = load(args.artefact, threads=1)
    [request, *_] = make_requests(scorer, args.history, args.candidates, 1)
    together = scorer.reader(scorer.reader.from_json([request]))
    columns = [name for name in request if name.startswith("candidate.")]
    alone = [
        scorer.reader(scorer.reader.from_json([request | {name: request[name][i : i + 1] for name in columns}]))
        for i in range(args.candidates)
    ]
    measured: dict[str, list[float]] = {"one_pass_cpu_ms": [], "passes_cpu_ms": []}
    for _ in range(_REPEATS + 1):
        for name, tokens in (("one_pass_cpu_ms", [together]), ("passes_cpu_ms", alone)):
            began_s = time.thread_time()
            for part in tokens:
                scorer.score_tokens(part)
            measured[name].append((time.thread_time() - began_s) * 1000)
    return {name: _spread(times_ms[1:]) for name, times_ms in measured.items()}


def _score_once(scorer: typing.Any, body: bytes, add: typing.Callable[[str, float], None]) -> None:
    times_s = [time.thread_time()]

    def done(phase: str) -> None:
        times_s.append(time.thread_time())
        add(phase, times_s[-1] - times_s[-2])

    requests = msgspec.json.decode(body)["requests"]
    done("decode")
    tokens = scorer.reader(scorer.reader.from_json(requests))
    done("ids")
    logits = scorer.score_tokens(tokens)
    done("score")
    msgspec.json.encode(scorer.answers(tokens, logits))
    done("answer")
    add("all", times_s[-1] - times_s[0])


def _server_cost(process: psutil.Process, port: int, asked: list[bytes]) -> float:
    _post(port, asked[:5])
    before_s = sum(process.cpu_times()[:2])
    _post(port, asked)
    return (sum(process.cpu_times()[:2]) - before_s) * 1000 / len(asked)


def _post(port: int, asked: list[bytes]) -> None:
    """Sends requests one after the other."""
    for body in asked:
        (sample,) = asyncio.run(send_at("127.0.0.1", port, [body], [0.0]))
        assert sample.status == 200, sample


def start(args: argparse.Namespace) -> dict[str, typing.Any]:
    """CPU seconds from the start of the process until it is ready, and private memory of each worker then and later."""
    asked, cpu_s, wall_s, private_mib, loaded_mib = _bodies(args), [], [], [], []
    for _ in range(_REPEATS):
        began_s = time.monotonic()
        with server(args, "--deadline_ms", 10**6) as (process, port):
            wall_s.append(time.monotonic() - began_s)
            workers = process.children() or [process]
            cpu_s.append(sum(sum(each.cpu_times()[:2]) for each in {process, *workers}))
            private_mib.append(max(_private_mib(worker) for worker in workers))
            _post(port, asked)
            loaded_mib.append(max(_private_mib(worker) for worker in workers))
    size = sum(path.stat().st_size for path in args.artefact.rglob("*") if path.is_file())
    return {
        "cpu_s": _spread(cpu_s),
        "wall_s": _spread(wall_s),
        "private_mib": _spread(private_mib),
        "private_mib_after_requests": _spread(loaded_mib),
        "artefact_mib": size // 2**20,
        "workers": args.workers,
    }


# ---- load -----------------------------------------------------------------------------------------------------------


def overload(args: argparse.Namespace) -> dict[str, typing.Any]:
    """Three times the capacity `--qps`: what is served in time, what is refused, and how fast."""
    with server(args, "--deadline_ms", args.latency_ms) as (_, port):
        samples = asyncio.run(send_at("127.0.0.1", port, _bodies(args), poisson_times(3 * args.qps, args.duration_s)))
    return _statuses(samples) | {
        "goodput_share": sum(sample.status == 200 for sample in samples) / (args.qps * args.duration_s),
        "served_p99_ms": percentile_ms(samples, 99, 200),
        "refused_p99_ms": percentile_ms(samples, 99, 503),
        "late_p99_ms": percentile_ms(samples, 99, 504),
        "client_late_p99_ms": float(np.percentile([sample.late_s * 1000 for sample in samples], 99)),
        "refused_from_sending_p99_ms": percentile_ms([_from_sending(sample) for sample in samples], 99, 503),
    }


def _from_sending(sample: Sample) -> Sample:
    return dataclasses.replace(sample, latency_s=sample.latency_s - sample.late_s)


def reload(args: argparse.Namespace) -> dict[str, typing.Any]:
    """Load of `--qps` for up to 40 s without, then for `--duration_s` with `--reloads` changes of version, each to one
    that is not in memory. Half the capacity for ten minutes is a soak: memory should stay flat, and nothing fail.
    """
    times_s, asked = poisson_times(args.qps, args.duration_s), _bodies(args)
    calm_s = poisson_times(args.qps, min(args.duration_s, 40.0))
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder) / "ctr"
        versions = copy_versions(args.artefact, root, 3)
        with server(args, "--deadline_ms", 10**6, root=root) as (process, port):
            calm = asyncio.run(send_at("127.0.0.1", port, asked, calm_s, _HEAD_BYTES))
            memory_mib = [_private_mib(process)]

            async def changing() -> list:
                sending = asyncio.create_task(send_at("127.0.0.1", port, asked, times_s, _HEAD_BYTES))
                for number in range(args.reloads):
                    await asyncio.sleep(args.duration_s / (args.reloads + 1))
                    make_current(root, versions[number % len(versions)])
                    memory_mib.append(_private_mib(process))
                return await sending

            changed = asyncio.run(changing())
            began_s = time.monotonic()
            make_current(root, versions[(args.reloads - 2) % len(versions)])
            while _served(port) != versions[(args.reloads - 2) % len(versions)]:
                time.sleep(0.01)
            rollback_s = time.monotonic() - began_s
        found = (re.search(rb'"version":"([^"]+)"', sample.body) for sample in changed)
        seen = {match[1] for match in found if match}
    return _statuses(changed) | {
        "p99_ms": percentile_ms(changed, 99, 200),
        "p99_ms_without_reloads": percentile_ms(calm, 99, 200),
        "p50_ms": percentile_ms(changed, 50, 200),
        "p50_ms_without_reloads": percentile_ms(calm, 50, 200),
        "rollback_s": round(rollback_s, 3),
        "versions_seen": len(seen),
        "private_mib": [round(each) for each in memory_mib],
    }


def copy_versions(artefact: pathlib.Path, root: pathlib.Path, count: int) -> list[str]:
    """Copies the current version of an artefact `count` times, under other times of export; the last is current."""
    shutil.copytree(artefact, root)
    current = json.loads((root / "current.json").read_text())["version"]
    digest = current.rpartition("-")[2]
    year = 1000 + len(list((root / VERSIONS).iterdir()))  # other names than those that are there
    names = [f"{year}0101T{number:06}Z-{digest}" for number in range(count)]
    for name in names:
        shutil.copytree(root / VERSIONS / current, root / VERSIONS / name)
    make_current(root, names[-1])
    return names


def _served(port: int) -> str:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/v2/models/ctr")
        return json.loads(connection.getresponse().read())["versions"][0]


SCENARIOS = {"cost": cost, "passes": passes, "start": start, "overload": overload, "reload": reload}


# ---- parts ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(
    args: argparse.Namespace, *options: object, root: pathlib.Path | None = None
) -> typing.Iterator[tuple[psutil.Process, int]]:
    """Starts a server on a free port; gives its process and the port once it is ready."""
    command = [sys.executable, "-m", "gpsd_dist.serve", str(root or args.artefact), "--port", "0", "--name", "ctr"]
    command += ["--workers", str(args.workers), "--batch_tokens", str(args.batch_tokens), *map(str, options)]
    command += ["--history_cache_mib", str(args.history_cache_mib)]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            until_s = time.monotonic() + _START_S
            while (
                len(found := re.findall(r"ready: .*:(\d+)$", pathlib.Path(log.name).read_text(), re.M)) < args.workers
            ):
                if process.poll() is not None or time.monotonic() > until_s:
                    raise RuntimeError(pathlib.Path(log.name).read_text())
                time.sleep(0.01)
            yield psutil.Process(process.pid), int(found[0])
        finally:
            process.terminate()
            process.wait(timeout=60)


def _text(log: typing.Any) -> str:
    return pathlib.Path(log.name).read_text()


def _bodies(args: argparse.Namespace, count: int = 50) -> list[bytes]:
    scorer = load(args.artefact, verify=False)
    if args.history > (longest := scorer.manifest.max_history_length):
        raise SystemExit(f"error: {args.artefact} reads the last {longest} events, not {args.history}; set --history")
    return bodies(make_requests(scorer, args.history, args.candidates, count))


def _private_mib(process: psutil.Process) -> float:
    """Memory that no other process can share: without pages of mapped files, which the kernel may drop."""
    text = pathlib.Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return int(re.search(r"^Anonymous:\s+(\d+)", text, re.MULTILINE)[1]) / 1024


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def _statuses(samples: list) -> dict[str, typing.Any]:
    counted: dict[str, int] = {}
    for sample in samples:
        counted[str(sample.status)] = counted.get(str(sample.status), 0) + 1
    return {"statuses": counted, "requests": len(samples)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

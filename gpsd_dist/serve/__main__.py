"""ENTRY: answers scoring requests over HTTP with the current version of an artefact.

    python -m gpsd_dist.serve artefacts/ctr --port 8080
    curl -s localhost:8080/v1/score -H 'content-type: application/json' -d @request.json

One process per core (--workers), one thread of torch each; tables are mapped, so workers share them. `current.json`
is watched: an export or a rollback changes the version without a failed request. SIGTERM: not ready, then the requests
under way are answered, then exit status 0. Binds to 127.0.0.1 unless told otherwise: there is no TLS and no login here.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.serve ...")

import argparse
import contextlib
import logging
import math
import pathlib
import socket

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.text import log_as_text, say_error
from gpsd_dist.serve.workers import run_worker, run_workers


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the options; ends the program with status 2 for those that cannot be meant."""
    parser = Parser(prog="python -m gpsd_dist.serve", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("artefact", type=pathlib.Path, help="folder that python -m gpsd_dist.export wrote")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8080, help="0: a free one, printed (default 8080)")
    add("--name", help="name of the model in paths (default: that of the folder)")
    add("--workers", type=int, default=1, help="processes; one per core (default 1)")
    add("--queue_tokens", type=int, default=20_000, help="events and candidates that may wait; more get 503")
    add("--batch_tokens", type=int, default=2000, help="of what waits, score up to this many at once (default 2000)")
    add("--deadline_ms", type=float, default=80.0, help="what has waited longer gets 504 (default 80)")
    add("--max_body_mib", type=float, default=8.0, help="longer bodies get 413 (default 8)")
    cache_help = "memory of a worker for encoded histories (Transformer, SASRec, HSTU; default 0: none)"
    add("--history_cache_mib", type=float, default=0.0, help=cache_help)
    add("--reload_s", type=float, default=0.5, help="seconds between looks at current.json (default 0.5)")
    add("--linger_s", type=float, default=0.0, help="after SIGTERM serve on, but not ready, so long (default 0)")
    add("--drain_s", type=float, default=10.0, help="then give requests under way so long (default 10)")
    add("--log_requests", type=pathlib.Path, metavar="DIR", help="keep a sample of requests and scores as Parquet")
    add("--sample", type=float, default=0.001, help="share of requests to log (default 0.001)")
    add("--log_days", type=float, default=7.0, help="delete logged requests after so many days (default 7)")
    add("--log_user_ids", action="store_true", help="log user ids as they come, not hashed")
    args = parser.parse_args(argv)
    numbers = {name: value for name, value in vars(args).items() if isinstance(value, float)}
    problems = [f"--{name} {value} must be finite" for name, value in numbers.items() if not math.isfinite(value)]
    if not 0 <= args.port < 2**16:
        problems.append(f"--port {args.port} must be between 0 and 65535")
    positive = ("workers", "queue_tokens", "batch_tokens", "deadline_ms", "max_body_mib", "reload_s", "log_days")
    problems += [f"--{name} {getattr(args, name)} must be above 0" for name in positive if not getattr(args, name) > 0]
    problems += [
        f"--{name} must not be below 0"
        for name in ("linger_s", "drain_s", "history_cache_mib")
        if not getattr(args, name) >= 0
    ]
    if not 0 <= args.sample <= 1:
        problems.append(f"--sample {args.sample} must be between 0 and 1")
    if problems:
        parser.error("; ".join(problems))
    return args


def main(argv: list[str]) -> int:
    """Returns 0 after SIGTERM or Ctrl-C, 1 if workers cannot start, 2 for a mistake in the options or the artefact."""
    args = parse(argv)
    log_as_text("%(asctime)s %(process)d %(levelname)s %(message)s", logging.INFO)
    try:
        with _bound(args.host, args.port) as listener:
            if args.workers == 1:
                return run_worker(args, listener, contextlib.nullcontext())
            return run_workers(args, listener)
    except (ValueError, OSError) as error:
        return say_error(error)


def _bound(host: str, port: int) -> socket.socket:
    """Binds without listening: until a worker is ready, connections are refused instead of waiting for it."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"--host {host} is no address or name of this machine ({error}); choose another one") from error
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port} ({error.strerror}); choose another --port") from error
    return listener


if __name__ == "__main__":
    sys.exit(run_main(main, name="serve"))

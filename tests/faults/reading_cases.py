"""Faults of reading, of syncing, and of what lies in the output folder. Otherwise as in `cases`."""

import contextlib
import errno
import json
import os
import pathlib
import socket
import subprocess

import pytest

from gpsd_dist.distributed import exit_codes
from tests.faults.jobs import SAVE_INTERVAL, Run, Workshop, finish, wait_until
from tests.helpers.sockets import LOOPBACK, listening

HANG = ("--gin.TrainConfig.hang_timeout_s=8",)
_NOW = "cannot be read now"
_PRELOAD = pathlib.Path(__file__).with_name("preload.c")


def _passes(workshop: Workshop, name: str, place: str, step: int, part: str, number: int) -> int:
    """The read is tried again, and nothing is restarted."""
    run = Run(workshop, name)
    if place == "load":
        run.stop_at(9)
    ended = run.train(run.fault("fail_opens", place, step, part=part, number=number, times=1))
    assert ended.status == exit_codes.FINISHED, ended.stderr
    ended.says(_NOW, os.strerror(number), "trying again")
    assert "attempts left" not in ended.stderr
    return run.done(0)


def stale_handle_while_data_are_opened(workshop: Workshop) -> int:
    """ESTALE once, as of an NFS server that was restarted."""
    return _passes(workshop, "stale_data", "start", 0, "valid/part-00000.parquet", errno.ESTALE)


def io_error_while_a_validation_opens_its_data(workshop: Workshop) -> int:
    """EIO once, in the middle of the run."""
    return _passes(workshop, "eio_valid", "validation", 5, "valid/part-00000.parquet", errno.EIO)


def time_out_while_the_manifest_is_read(workshop: Workshop) -> int:
    return _passes(workshop, "timeout_manifest", "start", 0, "manifest.json", errno.ETIMEDOUT)


def stale_handle_while_a_checkpoint_is_loaded(workshop: Workshop) -> int:
    """After its files were verified, while tensors are read."""
    return _passes(workshop, "stale_checkpoint", "load", 0, ".distcp", errno.ESTALE)


def no_memory_while_an_index_is_read(workshop: Workshop) -> int:
    return _passes(workshop, "enomem_index", "load", 0, "index.json", errno.ENOMEM)


def read_error_inside_of_arrow(workshop: Workshop) -> int:
    """By a library that is loaded before the C library: one read of one file fails, wherever it is called."""
    run = Run(workshop, "preload")
    library = run.folder / "preload.so"
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, _PRELOAD, "-ldl"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a C compiler is needed: {error}")
    once = run.folder / "read_failed"
    variables = {"LD_PRELOAD": str(library), "FAIL_PATH": "pretrain/part-00000.parquet", "FAIL_ERRNO": "116"}
    ended = run.train(env=variables | {"FAIL_ONCE": str(once)})
    assert ended.status == exit_codes.FINISHED and once.exists(), ended.stderr
    ended.says(_NOW, os.strerror(errno.ESTALE))
    return run.done(0)


def _unreadable(workshop: Workshop, name: str, place: str, part: str, **more) -> int:
    """Status 74 and no damage; later the same command goes on, from the newest checkpoint."""
    run = Run(workshop, name)
    run.stop_at(9)
    newest = max((run.output / "checkpoints").glob("step_*"))
    ended = run.train(run.fault("fail_opens", place, 0, part=part, number=errno.EIO, times=999, **more))
    assert ended.status == exit_codes.NO_FILE_ACCESS, ended.stderr
    ended.says(_NOW, os.strerror(errno.EIO), "the same command goes on")
    assert "trying the checkpoint before it" not in ended.stderr and "build the data set again" not in ended.stderr
    run.goes_on(f"weights: resumed from {newest}")
    return run.done(0)


def data_unreadable_for_long(workshop: Workshop) -> int:
    return _unreadable(workshop, "eio_data", "start", "valid/part-00000.parquet")


def checkpoint_unreadable_for_long(workshop: Workshop) -> int:
    """The run does not go back to the checkpoint before it."""
    return _unreadable(workshop, "eio_checkpoint", "load", ".distcp")


def checkpoint_unreadable_while_verified(workshop: Workshop) -> int:
    return _unreadable(workshop, "eio_verify", "start", "__1_0.distcp")


def descriptors_run_out_for_a_while(workshop: Workshop) -> int:
    """EMFILE for two seconds, while a validation opens its files."""
    run = Run(workshop, "descriptors")
    ended = run.train(run.fault("run_out_of_descriptors", "validation", 5, seconds=2))
    assert ended.status == exit_codes.FINISHED, ended.stderr
    ended.says(_NOW, os.strerror(errno.EMFILE))
    return run.done(0)


def slow_sync(workshop: Workshop) -> int:
    """Each sync of a checkpoint takes half as long again as the watchdog allows a silence: no hang, no restart."""
    run = Run(workshop, "slow_sync")
    ended = run.train(run.fault("slow_sync", "batch", 1, part=".distcp", seconds=12), *HANG)
    assert ended.status == exit_codes.FINISHED, ended.stderr
    return run.done(0)


def failing_sync(workshop: Workshop) -> int:
    """What was not synced does not count as saved."""
    run = Run(workshop, "failing_sync")
    ended = run.train(run.fault("fail_sync", "batch", 7, part=".distcp", number=errno.EIO))
    assert ended.status == exit_codes.NO_FILE_ACCESS, ended.stderr
    ended.says("was not written: rank 1: ", "Safe: ", os.strerror(errno.EIO))
    run.goes_on("weights: resumed from")
    return run.done(2 * SAVE_INTERVAL)


def links_in_the_output_folder(workshop: Workshop) -> int:
    """Names of files that are written, aside or at last, lead out: nothing outside is touched."""
    run = Run(workshop, "links")
    victims = run.folder / "victims"
    victims.mkdir()
    (run.output / "checkpoints").mkdir(parents=True)
    for name in ("run_config.json.tmp", "plan.txt.tmp", "metrics.jsonl.tmp", "checkpoints/best.json.tmp", ".probe"):
        victim = victims / name.replace("/", "_")
        victim.write_text("precious")
        (run.output / name).symlink_to(victim)
    ended = run.train()
    assert ended.status == exit_codes.FINISHED, ended.stderr
    assert {victim.read_text() for victim in victims.iterdir()} == {"precious"}
    return run.done(0)


def _in_the_way(workshop: Workshop, name: str, file: str, put, kind: str) -> int:
    run = Run(workshop, name)
    run.output.mkdir()
    victim = run.folder / "victim"
    victim.write_text("precious")
    put(run.output / file, victim)
    ended = run.train(restarts=0)
    assert ended.status == exit_codes.NO_FILE_ACCESS, ended.stderr
    ended.says(f"{run.output / file} is a {kind}, expected a plain file")
    assert victim.read_text() == "precious"
    (run.output / file).unlink()
    assert run.train().status == exit_codes.FINISHED
    return run.done(0)


def link_in_place_of_the_lock(workshop: Workshop) -> int:
    return _in_the_way(workshop, "lock_link", ".lock", lambda path, victim: path.symlink_to(victim), "link")


def link_in_place_of_the_options(workshop: Workshop) -> int:
    return _in_the_way(workshop, "config_link", "plan.txt", lambda path, victim: path.symlink_to(victim), "link")


def pipe_in_place_of_the_metrics(workshop: Workshop) -> int:
    """It used to block the run for twenty minutes."""
    return _in_the_way(workshop, "metrics_pipe", "metrics.jsonl", lambda path, _: os.mkfifo(path), "pipe")


def bytes_of_a_stranger_at_the_ports(workshop: Workshop) -> int:
    """Whoever is on this machine reaches the ranks alone, and nothing that he sends them changes a bit."""
    run = Run(workshop, "ports")
    fault = run.fault("sleep", "batch", 7, seconds=3)
    job = run.start(fault)
    wait_until(lambda: os.path.exists(fault["once"]) or job.poll() is not None, "step 7")
    ranks = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert not listening(job.pid), "the launcher listens"
    places = [place for rank in ranks for place in listening(int(rank))]
    assert places and {address for address, _ in places} <= LOOPBACK, places
    for _, port in places:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(bytes(range(256)) * 16)
    ended = finish(job)
    assert ended.status == exit_codes.FINISHED, ended.stderr
    return run.done(0)


def finished_run_again(workshop: Workshop) -> int:
    """Nothing of it is written anew: options, command, commit and metrics stay those of the run."""
    run = Run(workshop, "again")
    assert run.train().status == exit_codes.FINISHED

    def files():
        paths = [path for path in run.output.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    before = files()
    ended = run.train(None, "--gin.TrainConfig.log_interval_steps=5")
    assert ended.status == exit_codes.FINISHED, ended.stderr
    ended.says("this run is finished")
    assert files() == before
    return run.done(0)


def half_a_line_of_metrics(workshop: Workshop) -> int:
    run = Run(workshop, "half_a_line")
    run.stop_at(9)
    with open(run.output / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "tr')
    run.goes_on("weights: resumed from")
    return run.done(0)


def damaged_best_json(workshop: Workshop) -> int:
    run = Run(workshop, "best_json")
    run.stop_at(9)
    (run.output / "checkpoints" / "best.json").write_text('{"step": "\x1b[31m')
    run.goes_on("weights: resumed from")
    assert json.loads((run.output / "checkpoints" / "best.json").read_text())["step"] > 0
    return run.done(0)


CASES = (
    stale_handle_while_data_are_opened,
    io_error_while_a_validation_opens_its_data,
    time_out_while_the_manifest_is_read,
    stale_handle_while_a_checkpoint_is_loaded,
    no_memory_while_an_index_is_read,
    read_error_inside_of_arrow,
    data_unreadable_for_long,
    checkpoint_unreadable_for_long,
    checkpoint_unreadable_while_verified,
    descriptors_run_out_for_a_while,
    slow_sync,
    failing_sync,
    links_in_the_output_folder,
    link_in_place_of_the_lock,
    link_in_place_of_the_options,
    pipe_in_place_of_the_metrics,
    bytes_of_a_stranger_at_the_ports,
    finished_run_again,
    half_a_line_of_metrics,
    damaged_best_json,
)

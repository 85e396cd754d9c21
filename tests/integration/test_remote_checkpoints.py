"""Checkpoints in a bucket of a real S3 server on this machine: trained, killed, resumed, evaluated, looked at."""

import dataclasses
import logging
import os
import time

import fsspec
import pytest
import torch.distributed as dist

from gpsd_dist.checkpoint import integrity, manager, retention, saving
from gpsd_dist.checkpoint.__main__ import main
from gpsd_dist.checkpoint.integrity import DamagedCheckpoint
from gpsd_dist.checkpoint.storage import location
from gpsd_dist.config import TrainConfig
from gpsd_dist.trained_run import evaluate_checkpoint
from gpsd_dist.trainer import Trainer
from tests.helpers import forked
from tests.helpers.distributed import run_distributed
from tests.integration.test_async_checkpoints import _state, _tensors
from tests.integration.tiny_data import cpu_runtime, differing, read_checkpoint, step_folder, tiny_run, train_runs

moto_server = pytest.importorskip("moto.server", reason="no S3 server: moto is not installed")
pytestmark = pytest.mark.timeout(420)
WAIT_S = 200.0


@pytest.fixture(scope="module")
def bucket():
    """`s3://bucket` of a server that lives as long as this module's tests."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


def _train_alone(run, variables) -> None:
    """Target of a process of its own, which the test kills."""
    os.environ.update(variables)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train_runs(0, 1, [run])


def test_run_is_trained_killed_resumed_and_evaluated_in_a_bucket(bucket, data_dir, tmp_path, one_rank):
    """kill -9 at any moment after two checkpoints; the end is bitwise that of a run on disk that was not killed."""
    folder = location(f"{bucket}/killed") / "checkpoints"
    train = {"epochs": 10**6, "save_interval_steps": 1, "keep_last": 2, "checkpoint_dir": f"{bucket}/killed"}
    endless = tiny_run("finetune", data_dir, tmp_path / "killed", train=train)
    process = forked.start(_train_alone, endless, dict(os.environ))
    deadline = time.monotonic() + WAIT_S
    while len(retention.complete(folder)) < 2:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -9
    latest = manager.newest_intact(folder)
    last_step = manager.read_state(latest).step + 3

    resumed = dataclasses.replace(endless, train=dataclasses.replace(endless.train, max_steps=last_step))
    Trainer(resumed, one_rank).train()
    on_disk = dataclasses.replace(resumed.train, checkpoint_dir="", save_interval_steps=0)
    Trainer(dataclasses.replace(resumed, output_dir=str(tmp_path / "disk"), train=on_disk), one_rank).train()
    remote = manager.find(f"{bucket}/killed", "last")
    assert str(remote) == f"{bucket}/killed/checkpoints/{step_folder('', last_step).name}"
    assert not differing(read_checkpoint(remote), read_checkpoint(step_folder(tmp_path / "disk", last_step)))
    assert not (tmp_path / "killed/checkpoints").exists()
    assert evaluate_checkpoint(f"{bucket}/killed", None, "valid", one_rank) == evaluate_checkpoint(
        tmp_path / "disk", None, "valid", one_rank
    )
    assert len(retention.complete(folder)) == 2  # pruned there too
    transferring = tiny_run("finetune", data_dir, tmp_path / "st", "ST", f"{bucket}/killed", train={"max_steps": 1})
    Trainer(transferring, one_rank).train()


def test_damage_in_a_bucket_is_found_and_the_checkpoint_before_it_used(bucket, tmp_path, one_rank):
    place = f"{bucket}/damaged"
    with saving.Checkpoints(place, one_rank, TrainConfig()) as checkpoints:
        for step in (1, 2):
            checkpoints.save(_tensors(float(step)), _state(step))
    older, newer = retention.complete(checkpoints.folder)
    (newer / "__0_0.distcp").write_bytes(b"something else")
    with pytest.raises(DamagedCheckpoint, match=r"__0_0.distcp has 14 bytes"):
        integrity.check(newer)
    assert manager.newest_intact(checkpoints.folder) == older
    checkpoints.go_back_to(older)
    assert manager.find(place) == manager.find(place, "last") == older


def test_commands_work_on_a_bucket(bucket, one_rank, capsys):
    place = f"{bucket}/commands"
    with saving.Checkpoints(place, one_rank, TrainConfig(keep_last=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(_tensors(float(step > 1)), _state(step, best_step=1))
    assert main(["verify", place]) == 0
    assert main(["diff", f"{checkpoints.folder}/step_00000002", f"{checkpoints.folder}/step_00000001"]) == 1
    assert "max abs difference 1, in 200 of 200 values" in capsys.readouterr().out
    assert main(["prune", place, "--keep_last", "1"]) == 0
    assert [path.name for path in retention.step_folders(checkpoints.folder)] == ["step_00000001", "step_00000003"]


def test_a_bucket_that_does_not_exist_is_an_error_with_its_name(bucket, one_rank):
    with pytest.raises(ValueError, match="s3://nowhere/run is neither a run folder"):
        manager.find("s3://nowhere/run")


def _save_from_ranks(rank: int, world_size: int, place: str) -> list[str]:
    with saving.Checkpoints(place, cpu_runtime(rank, world_size), TrainConfig()) as checkpoints:
        tensors = _tensors(1.0) | {f"of_rank_{rank}": {"w": _tensors(2.0)["table"]["item"]}}
        checkpoints.save(tensors, _state(1))
    integrity.check(checkpoints.folder / "step_00000001")
    return sorted(integrity.read_checksums(checkpoints.folder / "step_00000001").files)


@pytest.mark.slow
def test_ranks_write_into_one_bucket(bucket, tmp_path):
    first, second = run_distributed(_save_from_ranks, 2, tmp_path, f"{bucket}/ranks", timeout_s=300)
    assert first == second and {"__0_0.distcp", "__1_0.distcp", ".metadata", "run_state.json"} <= set(first)

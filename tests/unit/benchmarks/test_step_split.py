"""The split of a step: own time of nested phases, on one rank and on two, where waiting for the other one is seen."""

import dataclasses
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks import datasets, product, step_split
from benchmarks.step_split import COLLECTIVES, H2D, OTHER_THREADS, PHASES
from gpsd_dist.config import PretrainConfig
from gpsd_dist.distributed.runtime import Runtime
from tests.helpers.distributed import run_distributed

DELAY_S, STEPS = 0.2, 2


class _Ticks:
    """A clock that is moved by hand."""

    names = ("CPU", "wall")

    def __init__(self):
        self.now = [0.0, 0.0]

    def read(self):
        return tuple(self.now)

    def between(self, begin, end):
        return end[0] - begin[0], end[1] - begin[1]

    def pass_by(self, cpu, wall):
        self.now = [self.now[0] + cpu, self.now[1] + wall]


def test_a_phase_has_its_own_time_alone():
    clock = _Ticks()
    log = step_split._Log(clock)
    clock.pass_by(1, 1)
    with log.phase("outer"):
        clock.pass_by(2, 3)
        log.timed(lambda: clock.pass_by(4, 5), "inner")()
        clock.pass_by(8, 8)
        log.enter("tail")  # up to the end of `outer`
        clock.pass_by(16, 20)
    clock.pass_by(32, 32)
    cpu, wall = (log.seconds()[name] for name in clock.names)
    assert cpu == {"rest": 33, "outer": 10, "inner": 4, "tail": 16}
    assert wall == {"rest": 33, "outer": 11, "inner": 5, "tail": 20}


def test_a_phase_ends_with_an_error():
    log = step_split._Log(_Ticks())
    with pytest.raises(KeyError), log.phase("outer"):
        log.enter("inner")
        raise KeyError
    assert log.phase_now == "rest"


def test_table_has_a_row_per_name_and_clock():
    split = {"CPU": dict.fromkeys(PHASES, 1.0) | {OTHER_THREADS: 2.0}, "wall": dict.fromkeys(PHASES, 3.0)}
    table = step_split.split_table("Title", {"a": split})
    assert table.columns == ("name", "clock", *PHASES, OTHER_THREADS)
    assert table.rows == [("a", "CPU", *["1.0"] * len(PHASES), "2.0"), ("a", "wall", *["3.0"] * len(PHASES), "")]


def _data(folder):
    source = dataclasses.replace(
        datasets.SOURCES["grocery"],
        max_history_length=12,
        draw_lengths=datasets.Geometric(5, 12),
        num_items=300,
        num_rows=256,
    )
    return datasets.prepare_synthetic("pretrain", "rows", source, 0, folder)


def _product(data, folder, rank, world_size):
    pretrain = PretrainConfig(num_negatives=8, auxiliary=("category",))
    run = product.run_config(data, product.Size(1, 16, 2), 16 * world_size, pretrain, folder)
    return product.Product(run, Runtime(rank, world_size, rank, torch.device("cpu")))


def _weights(trained):
    weights = trained.trainer.components.tables.weights()
    tables = {name: value.local_shards()[0].tensor for name, value in weights.items()}
    return [tensor.clone() for tensor in (*trained.trainer.model.state_dict().values(), *tables.values())]


def _sleep_in_backward(trainer):
    backbone = trainer.model.backbone
    plain = backbone.forward

    def forward(*args, **kwargs):
        hidden = plain(*args, **kwargs)
        hidden.register_hook(lambda _: time.sleep(DELAY_S))
        return hidden

    backbone.forward = forward


def _sleep_in_copy(monkeypatch):
    plain = step_split.training_step_module.to_device

    def to_device(*args):
        time.sleep(DELAY_S)
        return plain(*args)

    monkeypatch.setattr(step_split.training_step_module, "to_device", to_device)


def _split_on(rank, world_size, data, folder):
    """{what rank 1 was slow in: split}, and whether the split changed a weight."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = [dist.Work.wait, torch.Tensor.backward, torch.autograd.backward, dist.all_to_all_single]
        one, other = (_product(data, folder / name, rank, world_size) for name in ("split", "plain"))
        found = {"nothing": one.split_step(STEPS)}
        other.run_steps(STEPS)
        is_same = all(torch.equal(a, b) for a, b in zip(_weights(one), _weights(other), strict=True))
        assert calls == [dist.Work.wait, torch.Tensor.backward, torch.autograd.backward, dist.all_to_all_single]
        assert one.trainer.training_step.components is one.trainer.components
        if rank == 1:
            _sleep_in_backward(other.trainer)
        found["backward"] = other.split_step(STEPS)
        if rank == 1:
            _sleep_in_copy(monkeypatch)
        found["copy"] = one.split_step(STEPS)
        for trained in (one, other):
            trained.close()
        return found, is_same


def test_two_ranks_show_their_exchange_and_who_waits(tmp_path):
    (first, first_same), (second, second_same) = run_distributed(
        _split_on, 2, tmp_path, _data(tmp_path), tmp_path, timeout_s=120.0
    )
    assert first_same and second_same
    for split in (first["nothing"], second["nothing"]):
        assert split["wall"][COLLECTIVES] > 0 and split["CPU"][OTHER_THREADS] > 0
        assert all(split["CPU"][phase] > 0 for phase in ("lookup", "embed + tower", "head + loss", "backward"))
        assert all(split["CPU"][phase] > 0 for phase in ("table backward + update", "dense optimizer", "rest"))
    delay_ms = 1000 * DELAY_S
    for slow, own_phase in (("backward", "backward"), ("copy", H2D)):
        # Lower bounds alone: a busy machine makes everything slower, but no sleep shorter.
        assert second[slow]["wall"][own_phase] - second[slow]["CPU"][own_phase] > 0.99 * delay_ms
        assert second[slow]["wall"][own_phase] > first[slow]["wall"][own_phase]
        # Rank 0 stands still in DDP's exchange, or in that of the counts, and that costs it no CPU time.
        waits = {clock: first[slow][clock][COLLECTIVES] for clock in ("wall", "CPU")}
        assert waits["wall"] > first[slow]["wall"][own_phase] and waits["wall"] > 2 * waits["CPU"]


def test_one_rank_has_no_exchange(tmp_path):
    """And every clock's phases add up to no more than the whole."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trained = _product(_data(tmp_path), tmp_path / "run", 0, 1)
        trained.run_steps(1)
        begin = time.perf_counter()
        split = trained.split_step(STEPS)
        whole_ms = 1000 * (time.perf_counter() - begin)
        trained.close()
    finally:
        dist.destroy_process_group()
    total_ms = STEPS * sum(split["wall"].values())
    assert split["CPU"]["backward"] > 20 * split["CPU"][COLLECTIVES]
    assert 0 < total_ms + 1000 * product._DRAIN_S <= whole_ms * 1.001


@pytest.mark.gpu
def test_events_time_what_the_gpu_does_not_its_launch():
    x = torch.randn(4096, 4096, device="cuda")
    torch.mm(x, x)
    torch.cuda.synchronize()
    log = step_split._Log(step_split._GpuClock())
    with log.phase("products"):
        for _ in range(20):
            torch.mm(x, x)
    found = log.seconds()
    assert found["GPU"]["products"] > 2 * found["wall"]["products"] > 0

"""A signal sets a flag; the flag of one rank stops all of them at one step."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from gpsd_dist.distributed import exit_codes, stopping
from gpsd_dist.distributed.stopping import StopRequests
from tests.helpers.distributed import run_distributed


@pytest.fixture(autouse=True)
def heeded():
    """Under nohup, or as a background job of a shell, the tests would start with these ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, exit_codes.STOPPED),
        (signal.SIGHUP, exit_codes.STOPPED),
        (signal.SIGINT, exit_codes.INTERRUPTED),
    ],
)
def test_signal_is_noted_and_obeyed_when_the_ranks_agree(one_rank, number, status):
    before = signal.getsignal(number)
    with StopRequests() as stops:
        assert not stops.agreed() and stops.exit_code == exit_codes.FINISHED
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # from the terminal and through torchrun
        assert stops.agreed() and stops.exit_code == status
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored(one_rank):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stops:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stops.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_ctrl_c_of_an_impatient_person_interrupts(monkeypatch):
    with StopRequests() as stops:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(stopping, "_IMPATIENT_AFTER_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stops.exit_code == exit_codes.FINISHED  # nothing was saved


def test_sigterm_of_a_scheduler_wins_over_ctrl_c(one_rank):
    stops = StopRequests()
    stops.note(signal.SIGINT)
    stops.note(signal.SIGTERM)
    assert stops.agreed() and stops.exit_code == exit_codes.STOPPED


def _stop_one(rank: int, world_size: int) -> list:
    with StopRequests() as stops:
        answers = [stops.agreed()]
        if rank == 1:
            stops.note(signal.SIGTERM)
        answers += [stops.agreed(), stops.agreed()]
    return [*answers, stops.exit_code]


def test_all_ranks_stop_when_one_is_asked(tmp_path):
    assert run_distributed(_stop_one, 2, tmp_path) == [[False, False, True, exit_codes.STOPPED]] * 2  # one call late


def _stop_one_between_long_steps(rank: int, world_size: int) -> list[bool]:
    stopping._LONG_STEP_S = 0.1
    answers = []
    with StopRequests() as stops:
        for call in range(3):
            if call == 2 and rank == 1:
                stops.note(signal.SIGTERM)
            answers.append(stops.agreed())
            time.sleep(0.15)
    return answers


def test_no_long_step_is_begun_after_a_signal(tmp_path):
    assert run_distributed(_stop_one_between_long_steps, 2, tmp_path) == [[False, False, True]] * 2


def _count_exchanges(rank: int, world_size: int) -> tuple[int, list[bool]]:
    original, calls = dist.all_reduce, []
    dist.all_reduce = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    with StopRequests() as stops:
        for _ in range(200):  # of microseconds each
            assert not stops.agreed()
        num_quiet = len(calls)
        if rank == 1:
            stops.note(signal.SIGTERM)
        answers = [stops.agreed() for _ in range(2 * stopping._MOST_STEPS)]
    return num_quiet, answers


def test_short_steps_share_an_exchange(tmp_path):
    """An exchange in each step would cost a small model more than its signals are worth."""
    (first, answers), (second, same) = run_distributed(_count_exchanges, 2, tmp_path)
    assert first == second < 200 / 4 and answers == same
    assert any(answers[: stopping._MOST_STEPS + 1])

"""The queue: bounded by tokens, oldest first, similar lengths together, late requests apart."""

import threading
import time

import pytest

from gpsd_dist.serving.queue import TokenQueue, Waiting

FAR_S = 1e9


def waiting(num_tokens: int, deadline_s: float = FAR_S) -> Waiting:
    return Waiting([{}], num_tokens, 0.0, deadline_s, lambda result: None)


def test_what_does_not_fit_is_refused_at_once_and_fits_again_later():
    queue = TokenQueue(max_tokens=100, batch_tokens=50)
    assert queue.offer(waiting(60)) and queue.offer(waiting(40))
    assert queue.num_tokens == 100
    assert not queue.offer(waiting(1))
    assert queue.take()[0][0].num_tokens == 60  # larger than a batch: alone
    assert queue.num_tokens == 40
    assert queue.offer(waiting(60)) and not queue.offer(waiting(1))


def test_a_batch_is_the_oldest_and_those_most_like_it():
    queue = TokenQueue(max_tokens=10_000, batch_tokens=100)
    for num_tokens in (30, 5, 31, 65, 28, 7):
        assert queue.offer(waiting(num_tokens))
    assert [w.num_tokens for w in queue.take()[0]] == [30, 31, 28, 7]  # 65 does not fit, 5 is further away
    assert [w.num_tokens for w in queue.take()[0]] == [5, 65]
    assert queue.num_tokens == len(queue) == 0


def test_nobody_starves():
    queue = TokenQueue(max_tokens=10**6, batch_tokens=100)
    odd = waiting(90)
    queue.offer(waiting(1))
    queue.offer(odd)
    for turn in range(3):  # noqa: B007
        for _ in range(200):
            queue.offer(waiting(1))
        if odd in queue.take()[0]:
            break
    assert turn == 1


def test_late_requests_are_handed_out_apart():
    queue = TokenQueue(max_tokens=100, batch_tokens=50)
    late, early = waiting(10, deadline_s=time.monotonic() - 1), waiting(10)
    queue.offer(late)
    queue.offer(early)
    assert queue.take() == ([early], [late])
    queue.offer(late)
    assert queue.take() == ([], [late])
    assert queue.num_tokens == 0


def test_closed_queue_refuses_and_hands_out_the_rest():
    queue = TokenQueue(max_tokens=100, batch_tokens=50)
    queue.offer(waiting(10))
    queue.close()
    assert not queue.offer(waiting(10))
    assert len(queue.take()[0]) == 1
    assert queue.take() is None


@pytest.mark.parametrize("end", ["offer", "close"])
def test_take_waits_for_the_first(end):
    queue = TokenQueue(max_tokens=100, batch_tokens=50)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    if end == "offer":
        queue.offer(waiting(3))
    else:
        queue.close()
    thread.join(timeout=30)
    assert len(taken) == 1 and (taken[0] is None) == (end == "close")


def test_nothing_is_lost_or_doubled_between_threads():
    queue = TokenQueue(max_tokens=10**9, batch_tokens=40)
    offered = [[waiting(1 + number % 30) for number in range(500)] for _ in range(4)]
    threads = [threading.Thread(target=lambda part=part: [queue.offer(w) for w in part]) for part in offered]
    taken: list[Waiting] = []

    def drain() -> None:
        while (handed := queue.take()) is not None:
            assert sum(w.num_tokens for w in handed[0]) <= 40
            taken.extend(handed[0])

    taker = threading.Thread(target=drain)
    taker.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.close()
    taker.join(timeout=60)
    assert sorted(map(id, taken)) == sorted(id(w) for part in offered for w in part)
    assert queue.num_tokens == 0

"""Rates over a sliding window, pauses left out."""

import math

from gpsd_dist.metrics import recorder, throughput


class _Clock:
    def __init__(self):
        self.now_s = 50.0

    def __call__(self):
        return self.now_s


def test_rates_cover_the_window_only():
    clock = _Clock()
    speed = throughput.Throughput(window_steps=2, clock=clock)
    for seconds, examples in ((10.0, 1), (1.0, 30), (3.0, 50)):
        with speed.data_wait():
            clock.now_s += seconds / 4
        clock.now_s += seconds * 3 / 4
        speed.step(examples, 10 * examples)
    rates = speed.rates()
    assert rates["perf/examples_per_s"] == 20 and rates["perf/tokens_per_s"] == 200
    assert rates["perf/step_ms"] == 2000 and rates["perf/data_wait_share"] == 0.25
    assert rates["perf/cpu_s"] > 0 and 0.01 < rates["perf/peak_rss_gib"] < 1000


def test_pause_counts_for_no_rate():
    clock = _Clock()
    speed = throughput.Throughput(clock=clock)
    clock.now_s += 1
    speed.step(10, 10)
    clock.now_s += 500  # a validation
    speed.restart()
    assert math.isnan(speed.rates()["perf/step_ms"])
    clock.now_s += 2
    speed.step(10, 10)
    assert speed.rates()["perf/examples_per_s"] == 5 and speed.rates()["perf/step_ms"] == 2000


def test_every_rate_has_a_reduction(tmp_path):
    speed = throughput.Throughput()
    speed.step(1, 1)
    recorded = recorder.Recorder(tmp_path, 0)
    speed.record_to(recorded)
    assert set(recorded.log(1, 0)) <= set(throughput.REDUCTIONS)
    recorded.close()


def test_a_rank_without_rows_records_the_names_of_the_others():
    """Names are compared over ranks, so FLOPs of 0 have to be there, too."""
    speeds = [throughput.Throughput(), throughput.Throughput()]
    speeds[0].step(1, 1, 1e9)
    speeds[1].step(0, 0, 0.0)
    assert set(speeds[0].rates()) == set(speeds[1].rates()) >= {"perf/tflops_per_s"}

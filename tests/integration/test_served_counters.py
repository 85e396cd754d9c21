"""A server that runs takes refreshed counters: `python -m gpsd_dist.counters`, without a new model."""

import dataclasses
import json

import numpy as np

from gpsd_dist.counters.__main__ import main
from gpsd_dist.schema import read_manifest, write_manifest
from gpsd_dist.serving import load
from gpsd_dist.serving.examples import REQUESTS_NAME
from tests.helpers.artefacts import write_artefact
from tests.helpers.server_process import serving
from tests.unit.serving.test_counters import write_data

NOW_S = 2_000_000_000
EVENTS = [("a", 10, True), ("b", 20, True), ("c", 30, True)]  # a and b are of category x, c has none


def test_a_running_server_takes_newer_counters_without_a_new_model(tmp_path):
    root, data = tmp_path / "ctr", tmp_path / "day1"
    version = write_artefact(root, write_data(data, EVENTS), counts=True)
    later = write_data(tmp_path / "day2", EVENTS + [("a", NOW_S - s, True) for s in range(2, 60)])
    write_manifest(dataclasses.replace(read_manifest(data), splits=()), later)
    request = json.loads((root / "versions" / version / REQUESTS_NAME).read_text())["requests"][0]
    request |= {name: (value * 2)[:2] for name, value in request.items() if name.startswith("candidate.")}
    request |= {"request_time_s": NOW_S, "candidate.item": ["a", "in no file"], "candidate.category": ["x", "x"]}
    with serving(root, "--reload_s", 0.1, "--deadline_ms", 30_000, folder=tmp_path) as server:
        (before,) = server.score(request)[1]["answers"]
        assert server.metric("gpsd_counters_as_of_seconds") == 31
        assert main(["--artefact", str(root), "--data", str(later)]) == 0
        server.wait_for(lambda: server.metric("gpsd_counters_as_of_seconds") == NOW_S - 1)
        (after,) = server.score(request)[1]["answers"]
    assert before["version"] == after["version"] == version
    assert (before["counters_age_s"], after["counters_age_s"]) == (NOW_S - 31, 1)
    # The second candidate is in no file: its category, which the request brings, has newer counts all the same.
    old, new = (np.array(answer["tasks"]["click"]["logit"]) for answer in (before, after))
    assert (np.abs(new - old) > 1e-4).all()
    (expected,) = load(root).score([request])
    np.testing.assert_allclose(new, expected.tasks["click"]["logit"], atol=1e-5, rtol=0)

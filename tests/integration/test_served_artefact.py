"""A trained run, exported and served by the real process: scores of `evaluate`, hostile bodies, damage, versions."""

import asyncio
import concurrent.futures
import json
import os
import pathlib
import random
import signal
import socket
from contextlib import ExitStack

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks.open_loop import poisson_times, send_at
from benchmarks.serving import copy_versions
from benchmarks.serving import main as benchmark
from benchmarks.serving_requests import bodies, make_requests
from gpsd_dist.export.exporter import export, read_source
from gpsd_dist.export.raw_requests import RawRequests
from gpsd_dist.serving import load
from gpsd_dist.serving.artefact import make_current, open_version
from tests.helpers.server_process import serving
from tests.integration.test_export import TOLERANCE, data_dir, evaluated
from tests.integration.tiny_data import tiny_run, train_runs

pytestmark = pytest.mark.timeout(300)
__all__ = ["data_dir"]  # a fixture: tiny data whose items have the attributes of items.parquet
PATIENT = ("--deadline_ms", 60_000, "--reload_s", 0.05)


@pytest.fixture(scope="module")
def source(tmp_path_factory, data_dir, one_rank):
    folder = tmp_path_factory.mktemp("run")
    train_runs(0, 1, [tiny_run("finetune", data_dir, folder, train={"max_steps": 4})])
    return read_source(folder, str(data_dir))


@pytest.fixture(scope="module")
def artefact(source, tmp_path_factory):
    """Three versions of one model; the last is current."""
    folder = tmp_path_factory.mktemp("artefacts")
    export(source, folder / "one")
    copy_versions(folder / "one", folder / "ctr", 3)
    return folder / "ctr"


@pytest.fixture(scope="module")
def server(artefact, tmp_path_factory):
    with serving(artefact, *PATIENT, folder=tmp_path_factory.mktemp("log")) as process:
        yield process


def valid_requests(source) -> list[dict]:
    rows = pq.read_table(pathlib.Path(source.run.data_dir) / "valid/part-00000.parquet")
    return json.loads(json.dumps(RawRequests(pathlib.Path(source.run.data_dir), source.manifest)(rows).to_pylist()))


def test_served_scores_are_those_of_score_and_of_evaluate(server, source, artefact, one_rank):
    requests, scorer = valid_requests(source), load(artefact)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # batched with one another, in any way
        served = [answer["answers"][0] for _, answer in pool.map(server.score, requests)]
    together = server.score(*requests)[1]["answers"]
    alone = [scorer.score([request])[0] for request in requests]
    for task in ("click", "buy"):
        for answers in (served, together):
            for answer, expected in zip(answers, alone, strict=True):
                found, logits = answer["tasks"][task], expected.tasks[task]
                np.testing.assert_allclose(found["logit"], logits["logit"], atol=TOLERANCE, rtol=0)
                np.testing.assert_allclose(found["probability"], logits["probability"], atol=TOLERANCE, rtol=0)
                assert (answer["unknown_ids"], answer["dropped_events"]) == (
                    expected.unknown_ids,
                    expected.dropped_events,
                )
    first = 0
    for logits, row_B in evaluated(source, one_rank):
        for task, expected_C in logits.items():
            found_C = np.concatenate([served[first + row]["tasks"][task]["logit"] for row in row_B.tolist()])
            np.testing.assert_allclose(found_C, expected_C.numpy(), atol=TOLERANCE, rtol=0)
        first += len(row_B)
    assert first == len(served)


def test_one_request_alone_gets_the_bits_of_score(server, source, artefact):
    scorer = load(artefact)
    for request in valid_requests(source)[:5]:
        _, answer = server.score(request)
        assert answer["answers"][0]["tasks"] == json.loads(json.dumps(scorer.score([request])[0].tasks))


def test_metadata_openapi_and_examples_agree_with_the_artefact(server, artefact):
    opened = open_version(artefact)
    _, model = server.get("/v2/models/ctr")
    assert model["versions"] == [opened.version] and model["parameters"]["source"] == opened.description.source
    examples = opened.read_json("examples.json")
    columns = {name for request in examples["requests"] for name in request}
    _, document = server.get("/openapi.json")
    described = document["components"]["schemas"]["RawRequest"]["properties"]
    assert columns <= described.keys() and columns <= {entry["name"] for entry in model["inputs"]}
    status, _, body = server.ask("POST", "/v1/score", json.dumps(examples).encode())
    assert status == 200 and len(json.loads(body)["answers"]) == len(examples["requests"])


VALUES = (
    None,
    0,
    -1,
    2**63,
    2**70,
    1e308,
    0.5,
    True,
    "",
    "x",
    "\u0000",
    "\ud800",
    "9" * 5000,
    [],
    [[]],
    {},
    [None],
    {"a": 1},
)


def test_hostile_bodies_get_an_answer_that_says_why(server, source, artefact):
    """Columns of every wrong kind, alone and beside good requests; nothing is an error of the server's own."""
    rng = random.Random(3)
    good = valid_requests(source)
    seen = set()
    for _ in range(400):
        request = dict(rng.choice(good))
        for _ in range(rng.randint(1, 2)):
            column = rng.choice([*request, "history.nothing", "label.click"])
            kind = rng.random()
            if kind < 0.2:
                request.pop(column, None)
            elif kind < 0.6 or not isinstance(request.get(column), list):
                request[column] = rng.choice(VALUES)
            else:
                request[column] = [*request[column], rng.choice(VALUES)][rng.randint(0, 1) :]
        body = json.dumps({"requests": [request, rng.choice(good)][: rng.randint(1, 2)]}).encode()
        status, _, answer = server.ask("POST", "/v1/score", body)
        assert status in (200, 400, 422), (status, answer, body[:2000])
        if status == 422:
            assert json.loads(answer)["error"] and "column" in json.loads(answer), answer
        seen.add(status)
        if rng.random() < 0.2:  # cut anywhere
            status, _, answer = server.ask("POST", "/v1/score", body[: rng.randrange(len(body))])
            assert status == 400, answer
    assert seen == {200, 422, 400}
    assert server.score(good[0])[0] == 200


def test_clock_backwards_unknown_items_and_new_attributes_are_served(server, artefact):
    scorer = load(artefact, verify=False)
    (request,) = make_requests(scorer, 6, 3, 1)
    late = request | {"request_time_s": request["history.time_s"][0]}
    _, answer = server.score(late, request | {"candidate.item": ["never seen"] * 3}, request)
    assert [entry["dropped_events"] for entry in answer["answers"]] == [6, 0, 0]
    assert answer["answers"][1]["unknown_ids"] >= 3
    assert server.metric('gpsd_data_total{what="events after the request"}') >= 6


def test_a_damaged_version_never_serves_and_the_next_good_one_does(server, artefact):
    versions = sorted(path.name for path in (artefact / "versions").iterdir())
    current = server.get("/v2/models/ctr")[1]["versions"][0]
    bad, good = [version for version in versions if version != current][:2]
    tower = artefact / "versions" / bad / "tower.safetensors"
    content = tower.read_bytes()
    tower.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    failed = server.metric('gpsd_reloads_total{outcome="failed"}')
    make_current(artefact, bad)
    server.wait_for(lambda: server.metric('gpsd_reloads_total{outcome="failed"}') == failed + 1)
    assert server.get("/v2/models/ctr")[1]["versions"] == [current]
    assert "tower.safetensors is not what was written" in server.log.read_text()
    make_current(artefact, good)
    server.wait_for(lambda: server.get("/v2/models/ctr")[1]["versions"] == [good])
    make_current(artefact, current)
    server.wait_for(lambda: server.get("/v2/models/ctr")[1]["versions"] == [current])
    tower.write_bytes(content)


SMALL = ("--history", "6", "--candidates", "4", "--qps", "20", "--duration_s", "1")


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (("--scenario", "Server", "--over", "process"), {"loadgen", "failed"}),
        (("--scenario", "Offline", "--over", "http"), {"loadgen", "failed"}),
        (("--scenario", "cost", "--over", "process"), {"all_cpu_ms", "ids_cpu_ms", "score_cpu_ms"}),
        (("--scenario", "overload"), {"goodput_share", "served_p99_ms", "statuses"}),
    ],
)
def test_benchmark_measures(artefact, tmp_path, options, keys):
    out = tmp_path / "measured.json"
    assert benchmark(["--artefact", str(artefact), *options, *SMALL, "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert keys <= measured.keys()
    if "loadgen" in keys:
        assert measured["failed"] == 0 and measured["loadgen"]["Result is"] in ("VALID", "INVALID")


@pytest.mark.slow
def test_a_soak_with_reloads_fails_no_request_and_keeps_its_memory(artefact, tmp_path):
    """The ten minutes of docs/serving.md in one."""
    out = tmp_path / "measured.json"
    options = ("--scenario", "reload", "--history", "10", "--candidates", "20", "--qps", "10", "--duration_s", "60")
    assert benchmark(["--artefact", str(artefact), *options, "--reloads", "20", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert measured["statuses"] == {"200": measured["requests"]} and measured["versions_seen"] == 3
    assert max(measured["private_mib"][8:]) < max(measured["private_mib"][:8]) + 20


HEAD = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HANGING = {  # what a client sends before it says nothing any more
    "in its headers": b"POST /v1/score HTTP/1.1\r\nHost:",
    "in its body": HEAD + b"Content-Length: 100\r\n\r\n{",
    "in a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{",
    "after no HTTP": b"\x16\x03\x01\x02\x00",
    "before anything": b"",
}
EMPTY_REQUESTS = b'{"requests": [' + b"{}," * 500_000 + b"{}]}"


def _children(server) -> list[int]:
    return [child.pid for child in psutil.Process(server.process.pid).children()]


def _kill_one(server, at: int = 0) -> None:
    """Kills a worker, and waits until another one has taken its place."""
    before = server.log.read_text().count("ready: ")
    os.kill(_children(server)[at], signal.SIGKILL)
    server.wait_for(lambda: server.log.read_text().count("ready: ") > before)


@pytest.mark.slow
def test_two_workers_outlive_kills_freezes_reloads_and_hostile_clients(artefact, tmp_path):
    """Good requests get the right logits all the while; broken connections are those of killed workers alone."""
    scorer = load(artefact)
    requests = make_requests(scorer, 6, 4, 20)
    expected = [answer.tasks["click"]["logit"] for answer in scorer.score(requests)]
    versions = sorted(path.name for path in (artefact / "versions").iterdir())
    options = ("--workers", 2, "--log_requests", tmp_path / "log", "--sample", 1, "--drain_s", 2, *PATIENT)
    with serving(artefact, *options, "--history_cache_mib", 1, folder=tmp_path) as server, ExitStack() as clients:
        server.wait_for(lambda: server.log.read_text().count("ready: ") == 2)

        def hostile() -> None:
            for sent in HANGING.values():
                client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
                client.sendall(sent)

        def disturb() -> None:
            hostile()
            for number in range(4):
                _kill_one(server, number % 2)
                make_current(artefact, versions[number % 3])
            make_current(artefact, versions[1])
            _kill_one(server)  # in the midst of a change of version
            frozen = _children(server)[0]
            os.kill(frozen, signal.SIGSTOP)
            assert server.ask("POST", "/v1/score", EMPTY_REQUESTS)[0] in (413, 503)
            os.kill(frozen, signal.SIGCONT)
            hostile()

        async def load_beside() -> list:
            sending = asyncio.create_task(send_at("127.0.0.1", server.port, bodies(requests), poisson_times(10, 40)))
            await asyncio.to_thread(disturb)
            return await sending

        samples = asyncio.run(load_beside())
        broken = [sample for sample in samples if sample.status == 0]
        assert {sample.status for sample in samples} <= {0, 200} and len(broken) < len(samples) / 10
        for number, sample in enumerate(samples):
            if sample.status == 200:
                [answer] = json.loads(sample.body)["answers"]
                assert answer["version"] in versions
                np.testing.assert_allclose(answer["tasks"]["click"]["logit"], expected[number % 20], atol=TOLERANCE)
        server.wait_for(lambda: server.get("/v2/models/ctr")[1]["versions"] == [versions[1]])
        assert server.end() == 0  # while the hostile ones hang
        log = server.log.read_text()
        assert "Traceback" not in log and log.count("ended with status -9") == 5
    rows = sum(pq.read_metadata(path).num_rows for path in (tmp_path / "log").glob("*.parquet"))
    assert 0 < rows <= len(samples) - len(broken)
    print(f"{len(samples)} requests, {len(broken)} on connections of killed workers, {rows} logged")

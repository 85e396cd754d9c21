"""The real server process with a scorer whose speed is set: what it answers, refuses, survives, and how it ends.

Assertions are on statuses and counts; bounds of time are generous, for a busy machine.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from benchmarks.open_loop import percentile_ms, poisson_times, send_at
from gpsd_dist.serving import request_log
from tests.helpers.fake_scorer import MAX_CANDIDATES, FakeReader, make_current, write_version
from tests.helpers.server_process import REPO_ROOT, serving

FAKE, IMPATIENT = "tests.helpers.fake_server", "tests.helpers.impatient_server"


def request(*candidates: str, history: int = 2, **columns: object) -> dict:
    return {"history.item": ["h"] * history, "candidate.item": list(candidates)} | columns


def logits(answer: dict) -> list[list[float]]:
    return [entry["tasks"]["click"]["logit"] for entry in answer["answers"]]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A quick server that many tests share; a deadline that a busy machine cannot miss."""
    root = tmp_path_factory.mktemp("artefact") / "ctr"
    write_version(root, "v1", offset=0.5)
    options = ("--deadline_ms", 30_000, "--queue_tokens", 3000, "--max_body_mib", 0.1)
    with serving(root, *options, module=FAKE, folder=root) as process:
        yield process


def test_scores_come_back_in_the_order_of_requests_and_candidates(server):
    status, answer = server.score(request("a", "bbb", "cc"), request("dddd"), request())
    assert status == 200 and answer["model"] == "ctr"
    assert logits(answer) == [[1.5, 3.5, 2.5], [4.5], []]
    assert [entry["version"] for entry in answer["answers"]] == ["v1"] * 3
    assert answer["answers"][0]["unknown_ids"] == 0


def test_health_and_metadata_are_at_the_paths_of_the_open_inference_protocol(server):
    assert server.get("/v2/health/live") == (200, {"live": True})
    assert server.get("/v2/health/ready") == server.get("/v2/models/ctr/ready") == (200, {"ready": True})
    assert server.get("/v2")[1]["name"] == "gpsd_dist"
    status, model = server.get("/v2/models/ctr")
    assert status == 200 and model["versions"] == ["v1"] and model["parameters"] == {"engine": "fake"}
    assert {"name": "history.item", "datatype": "BYTES", "shape": [-1]} in model["inputs"]
    assert [entry["name"] for entry in model["outputs"]] == ["click.logit", "click.probability"]


def test_openapi_document_names_columns_and_every_path(server):
    _, document = server.get("/openapi.json")
    schemas = document["components"]["schemas"]
    raw = schemas["RawRequest"]
    assert raw["required"] == ["history.item", "candidate.item"] and raw["additionalProperties"] is False
    assert {"user_id", "request_time_s", "history.time_s", "context.hour"} <= raw["properties"].keys()
    assert "408" in document["paths"]["/v1/score"]["post"]["responses"]
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references <= schemas.keys() and {"RawRequest", "Answer", "Refused"} <= references
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            status, _, _ = server.ask(method.upper(), path.replace("{name}", "ctr"), b"{}")
            assert str(status) in operation["responses"], path


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/", 404, "Not Found"),
        ("GET", "/v1/score/", 404, "Not Found"),
        ("GET", "/v2/models/other", 404, "it is 'ctr'"),
        ("GET", "/v1/score", 405, "Method Not Allowed"),
        ("DELETE", "/v1/score", 405, "Method Not Allowed"),
        ("POST", "/metrics", 405, "Method Not Allowed"),
    ],
)
def test_unknown_path_or_method(server, method, path, status, error):
    given, headers, body = server.ask(method, path)
    assert given == status and error in json.loads(body)["error"]
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "error"),
    [
        (b"{}", "text/plain", 415, "'text/plain' is not application/json"),
        (b"{}", "", 415, "is not application/json"),
        (b'{"requests": []}', "application/json; charset=utf-8", 422, "requests is empty"),
        (b"", "application/json", 400, "no JSON of the form"),
        (b"{}", "application/json", 400, "missing required field `requests`"),
        (b'{"requests": {}}', "application/json", 400, "Expected `array`, got `object`"),
        (b'{"requests": [5]}', "application/json", 400, "Expected `object`, got `int`"),
        (b'{"requests": [{}], "model": "x"}', "application/json", 400, "unknown field `model`"),
        (b'{"requests": [{"a": NaN}]}', "application/json", 400, "malformed"),
        (b'{"requests": [{"a": "\xff"}]}', "application/json", 400, "no JSON of the form"),
        (b'{"requests": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "application/json", 400, "no JSON of the form"),
        (b"\x1f\x8b\x08", "application/json", 400, "malformed"),
    ],
)
def test_bodies_that_are_no_request(server, body, content_type, status, error):
    given, _, answer = server.ask("POST", "/v1/score", body, content_type)
    assert given == status and error in json.loads(answer)["error"]


def test_a_wrong_column_is_named_and_its_neighbours_are_served(server):
    status, answer = server.score(request("a"), request("b", colour="red"))
    assert (status, answer["column"], answer["row"]) == (422, "colour", 1)
    status, answer = server.score(request(*["a"] * (MAX_CANDIDATES + 1)))
    assert status == 422 and answer["column"] == "candidate.item"
    status, answer = server.score({"history.item": "a", "candidate.item": ["b"]})
    assert status == 422 and answer["column"] == "history.item"
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        asked = [request("a") if i % 3 else request("a", colour="red") for i in range(60)]
        statuses = [status for status, _ in pool.map(server.score, asked)]
    assert statuses == [200 if i % 3 else 422 for i in range(60)]


def test_an_error_of_the_model_is_500_and_the_server_lives(server):
    status, answer = server.score(request("explode"))
    assert status == 500 and "cannot bear" not in json.dumps(answer)
    assert "a request that the model cannot bear" in server.log.read_text()
    assert server.score(request("a"))[0] == 200


def test_too_much_is_413_announced_or_not(server):
    huge = json.dumps({"requests": [request("x" * 200_000)]}).encode()
    status, headers, body = server.ask("POST", "/v1/score", huge)
    assert status == 413 and "at most 104,857" in json.loads(body)["error"] and headers["connection"] == "close"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:  # chunked: no length announced
        raw.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\n")
        raw.sendall(b"transfer-encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 65_536 + b"\r\n")
        raw.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")
    status, _, body = server.ask("POST", "/v1/score", b'{"requests": [' + b"{}," * 3000 + b"{}]}")
    assert status == 413 and json.loads(body)["error"] == "over 3,000 requests in a body: send several"
    many = [request(*["a"] * 900, history=0) for _ in range(4)]
    status, answer = server.score(*many)
    assert status == 413 and answer["error"].startswith("3,600 tokens in a body, at most 3,000")


def test_broken_http_does_not_end_the_server(server):
    for raw in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /v1/score HTTP/1.1\r\ncontent-length: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(raw)
            connection.recv(4096)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:  # leaves in the middle
        connection.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        )
    assert server.score(request("a"))[0] == 200


def test_metrics_count_statuses_phases_and_candidates(server):
    before = [server.metric(name) for name in ('gpsd_http_requests_total{status="200"}', "gpsd_batch_tokens_sum")]
    assert server.score(request("a", "b", history=7))[0] == 200
    assert server.metric('gpsd_http_requests_total{status="200"}') == before[0] + 1
    assert server.metric("gpsd_batch_tokens_sum") == before[1] + 9
    for phase in ("decode", "queue", "ids", "lookup", "answer"):
        assert server.metric(f'gpsd_phase_seconds_count{{phase="{phase}"}}') > 0
    assert server.metric('gpsd_reference{what="candidates"}') == 2
    assert server.metric("gpsd_counters_as_of_seconds") == FakeReader.counters.as_of_s
    assert server.metric('gpsd_recent{what="history_length"}') > 0
    assert server.metric('gpsd_version{version="v1"}') == 1 and server.metric("gpsd_queue_tokens") == 0


def test_overload_is_refused_and_what_is_served_is_in_time(tmp_path):
    """Three times the capacity: 20 ms of sleep a request, one at a time, room for five that wait, deadline 80 ms."""
    write_version(tmp_path, "v1", us_per_token=2000)
    body = json.dumps({"requests": [request("a", "b", history=8)]}).encode()
    options = ("--queue_tokens", 50, "--batch_tokens", 10, "--deadline_ms", 80)
    with serving(tmp_path, *options, module=FAKE, folder=tmp_path) as server:
        asyncio.run(send_at("127.0.0.1", server.port, [body], [0.0]))
        samples = asyncio.run(send_at("127.0.0.1", server.port, [body], poisson_times(150, 3.0)))
        assert server.metric("gpsd_queue_tokens") == 0
        assert server.ask("POST", "/v1/score", body)[0] == 200
    served = [sample for sample in samples if sample.status == 200]
    assert {sample.status for sample in samples} == {200, 503, 504}
    assert len(samples) > 380 and 40 < len(served) < 180  # 150 fit into 3 s if the machine is idle
    assert percentile_ms(samples, 99, 200) < 1000  # 80 + 20 on an idle machine; without a bound it would be 6,000
    refused = next(sample for sample in samples if sample.status == 503)
    assert "the queue is full" in json.loads(refused.body)["error"]


def test_refusal_says_when_to_come_back(tmp_path):
    write_version(tmp_path, "v1", us_per_token=1_000_000)
    with (
        serving(tmp_path, "--queue_tokens", 3, "--deadline_ms", 30_000, module=FAKE, folder=tmp_path) as server,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(server.score, request("a", history=0))
        server.wait_for(lambda: server.metric('gpsd_phase_seconds_count{phase="queue"}') == 1)
        second = pool.submit(server.score, request("a", "b", "c", history=0))
        server.wait_for(lambda: server.metric("gpsd_queue_tokens") == 3)
        body = json.dumps({"requests": [request("a")]}).encode()
        status, headers, _ = server.ask("POST", "/v1/score", body)
        assert (status, headers["retry-after"]) == (503, "1")
        assert first.result()[0] == second.result()[0] == 200


def test_a_body_as_long_as_one_that_did_not_fit_is_refused_undecoded(tmp_path):
    """The connection can be used on until it has been idle too long, and what is shorter still gets its place."""
    write_version(tmp_path, "v1", us_per_token=1_000_000)
    options = ("--queue_tokens", 4, "--batch_tokens", 1, "--deadline_ms", 30_000)
    with (
        serving(tmp_path, *options, module=IMPATIENT, folder=tmp_path) as server,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw,
    ):
        accepted = [pool.submit(server.score, request("a", "b", "c", history=0))]
        server.wait_for(lambda: server.metric('gpsd_phase_seconds_count{phase="queue"}') == 1)
        accepted.append(pool.submit(server.score, request("a", "b", "c", history=0)))
        server.wait_for(lambda: server.metric("gpsd_queue_tokens") == 3)
        body = json.dumps({"requests": [request("a", "b", history=0)]}).encode()
        decoded = server.metric('gpsd_phase_seconds_count{phase="decode"}')
        assert server.ask("POST", "/v1/score", body)[0] == 503
        raw.sendall(head(f"POST /v1/score HTTP/1.1\r\ncontent-length: {len(body)}"))
        time.sleep(0.1)
        raw.sendall(body)
        assert answered(raw).startswith(b"HTTP/1.1 503 ")
        raw.sendall(head("GET /v2/health/live HTTP/1.1"))
        assert answered(raw).startswith(b"HTTP/1.1 200 ")
        assert server.metric('gpsd_phase_seconds_count{phase="decode"}') == decoded + 1
        accepted.append(pool.submit(server.score, request("a", history=0)))
        assert [future.result()[0] for future in accepted] == [200, 200, 200]
        assert raw.recv(1) == b""


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    root = tmp_path_factory.mktemp("impatient") / "ctr"
    write_version(root, "v1")
    with serving(root, "--max_body_mib", 0.1, module=IMPATIENT, folder=root) as process:
        yield process


def head(lines: str) -> bytes:
    content_type = "" if "content-type" in lines else "\r\ncontent-type: application/json"
    return f"{lines}{content_type}\r\nHost: x\r\n\r\n".encode()


def answered(raw: socket.socket) -> bytes:
    """Head and body of the next answer."""
    answer = b""
    while not (found := re.search(rb"content-length: (\d+)\r\n(.*\r\n)*\r\n", answer)) or (
        len(answer) < found.end() + int(found[1])
    ):
        part = raw.recv(4096)
        assert part, answer
        answer += part
    return answer


REFUSED = [
    ("POST /v1/score HTTP/1.1\r\ncontent-type: text/plain", b"415"),
    ("POST /v1/score/ HTTP/1.1", b"404"),
    ("POST /metrics HTTP/1.1", b"405"),
]


@pytest.mark.parametrize(("lines", "status"), REFUSED)
def test_a_connection_with_a_refused_body_is_used_again_or_times_out(impatient, lines, status):
    for follows in (b"", head("GET /v2/health/live HTTP/1.1")):
        with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as raw:
            raw.sendall(head(f"{lines}\r\ncontent-length: 1000"))
            time.sleep(0.1)
            raw.sendall(b"x" * 1000)
            assert answered(raw).split()[1] == status
            if follows:
                raw.sendall(follows)
                assert answered(raw).startswith(b"HTTP/1.1 200 ")
            assert raw.recv(1) == b""


@pytest.mark.parametrize("lines", ["POST /v1/score HTTP/1.1", *(lines for lines, _ in REFUSED)])
@pytest.mark.parametrize("length", ["content-length: 90000", "transfer-encoding: chunked"])
def test_a_body_that_comes_slowly_and_does_not_end_is_ended(impatient, lines, length):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as raw:
        raw.sendall(head(f"{lines}\r\n{length}"))
        started_s = time.monotonic()
        with contextlib.suppress(ConnectionError):  # closed by the server
            while time.monotonic() < started_s + 15:
                raw.sendall(b"1\r\nx\r\n")
                time.sleep(0.05)
        assert time.monotonic() < started_s + 15


@pytest.mark.parametrize(
    "lines",
    ["GET /v2/health/live HTTP/1.1\r\ncontent-length: 9", "POST /v1/score HTTP/1.1\r\ncontent-length: 999999999"],
)
def test_an_answer_before_the_body_closes_the_connection(impatient, lines):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as raw:
        raw.sendall(head(lines))
        assert b"connection: close" in answered(raw)
        assert raw.recv(1) == b""


def test_reloads_under_load_fail_no_request_and_a_corrupt_version_never_serves(tmp_path):
    write_version(tmp_path, "v0", offset=0, us_per_token=500)
    body = json.dumps({"requests": [request("a", history=3)]}).encode()
    options = ("--reload_s", 0.02, "--deadline_ms", 30_000)

    async def load(port: int) -> list:
        sending = asyncio.create_task(send_at("127.0.0.1", port, [body], poisson_times(100, 4.5)))
        for number in range(1, 21):
            await asyncio.sleep(0.2)
            write_version(tmp_path, f"v{number}", offset=number, us_per_token=500, is_corrupt=number % 4 == 0)
        return await sending

    with serving(tmp_path, *options, module=FAKE, folder=tmp_path) as server:
        samples = asyncio.run(load(server.port))
        assert {sample.status for sample in samples} == {200}
        answers = [json.loads(sample.body)["answers"][0] for sample in samples]
        for answer in answers:  # an answer's scores are those of the version that it names
            assert answer["tasks"]["click"]["logit"] == [1 + int(answer["version"][1:])]
        seen = {int(answer["version"][1:]) for answer in answers}
        assert len(seen) > 8 and not seen & {4, 8, 12, 16, 20}
        make_current(tmp_path, "v19")
        server.wait_for(lambda: server.metric('gpsd_version{version="v19"}') == 1)
        make_current(tmp_path, "v18")  # rollback
        server.wait_for(lambda: server.score(request("a"))[1]["answers"][0]["version"] == "v18")
        assert server.metric('gpsd_reloads_total{outcome="failed"}') >= 3
        assert server.metric('gpsd_version{version="v18"}') == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_answers_what_is_under_way_and_ends_with_0(tmp_path, number):
    write_version(tmp_path, "v1", us_per_token=400_000)
    options = ("--linger_s", 1.0, "--deadline_ms", 30_000, "--batch_tokens", 3)
    with serving(tmp_path, *options, module=FAKE, folder=tmp_path) as server:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            under_way = [pool.submit(server.score, request("a", history=2)) for _ in range(3)]
            server.wait_for(lambda: server.metric("gpsd_queue_tokens") == 6)
            server.process.send_signal(number)
            if number == signal.SIGTERM:  # lingers: not ready, but alive and serving
                server.wait_for(lambda: server.get("/v2/health/ready") == (503, {"ready": False}))
                assert server.get("/v2/health/live")[0] == 200
            assert [future.result()[0] for future in under_way] == [200, 200, 200]
        assert server.process.wait(timeout=60) == 0
        with pytest.raises(OSError):
            server.get("/v2/health/live")


def test_two_workers_share_the_port_count_together_and_are_replaced(tmp_path):
    write_version(tmp_path, "v1", us_per_token=1000)
    options = ("--workers", 2, "--reload_s", 0.05, "--deadline_ms", 30_000)
    with serving(tmp_path, *options, module=FAKE, folder=tmp_path) as server:
        server.wait_for(lambda: server.log.read_text().count("ready: ") == 2)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert {status for status, _ in pool.map(server.score, [request("a")] * 80)} == {200}
        assert server.metric('gpsd_http_requests_total{status="200"}') == 80
        write_version(tmp_path, "v2")
        server.wait_for(lambda: server.metric('gpsd_reloads_total{outcome="loaded"}') == 2)
        listed = subprocess.run(
            ["ps", "--ppid", str(server.process.pid), "-o", "pid="], capture_output=True, text=True, check=True
        )
        children = [int(pid) for pid in listed.stdout.split()]
        assert len(children) == 2
        subprocess.run(["kill", "-KILL", str(children[0])], check=True)
        server.wait_for(lambda: server.log.read_text().count("ready: ") == 3)
        assert server.score(request("a"))[1]["answers"][0]["version"] == "v2"
        assert server.end() == 0


def test_logged_requests_are_written_at_the_end_which_a_client_that_hangs_does_not_stop(tmp_path):
    write_version(tmp_path, "v1")
    folder = tmp_path / "log"
    options = ("--log_requests", folder, "--sample", 1, "--deadline_ms", 30_000, "--drain_s", 1)
    with (
        serving(tmp_path, *options, module=FAKE, folder=tmp_path) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as hanging,
    ):
        head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        hanging.sendall(head)
        users = ("anna", "bert", "gone")
        assert server.score(*(request("a", user_id=user) for user in users))[0] == 200
        assert request_log.main([str(folder), "--forget", "gone"]) == 0
        assert server.end() == 0
        assert hanging.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert "Traceback" not in server.log.read_text()
    import pyarrow.parquet as pq

    (path,) = folder.glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert [row["score.click"] for row in rows] == [[1.0], [1.0]] and "anna" not in path.read_bytes().decode("latin1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "is damaged"),
        (("--log_requests", "/proc/here"), "--log_requests /proc/here cannot be written"),
        (("--workers", "2"), "is damaged"),
    ],
)
def test_a_start_that_cannot_succeed_ends_with_its_reason(tmp_path, options, message):
    write_version(tmp_path, "v1", is_corrupt="--log_requests" not in options)
    command = [sys.executable, "-m", FAKE, str(tmp_path), "--port", "0", *options]
    started_s = time.monotonic()
    result = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=90)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert time.monotonic() - started_s < 80


def test_a_port_in_use_is_named(tmp_path):
    write_version(tmp_path, "v1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", FAKE, str(tmp_path), "--port", str(port)]
        result = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=90)
    assert result.returncode == 2 and f"port {port}" in result.stderr and "another --port" in result.stderr

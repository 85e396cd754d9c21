"""What is refused or late leaves nothing behind that garbage collection has to find."""

import asyncio
import gc
import json
import weakref

import pytest

from gpsd_dist.serving.app import App, Limits
from gpsd_dist.serving.metrics import Metrics
from gpsd_dist.serving.queue import TokenQueue
from gpsd_dist.serving.scoring_thread import Late
from tests.helpers.fake_scorer import MANIFEST, FakeRequestError

BODY = json.dumps({"requests": [{"history.item": [], "candidate.item": ["a"]}]}).encode()


class Failing(TokenQueue):
    """Answers every request with an exception, as the scoring thread does."""

    def __init__(self, make):
        super().__init__(100, 10)
        self.make, self.made = make, []

    def offer(self, waiting) -> bool:
        try:
            raise self.make()
        except Exception as error:
            self.made.append(weakref.ref(error))
            waiting.reply(error)
        return True


async def status_of(app: App) -> int:
    sent = []

    async def receive():
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "raw_path": b"/v1/score", "query_string": b""}
    await app.asgi(scope | {"headers": headers, "http_version": "1.1", "root_path": ""}, receive, send)
    return sent[0]["status"]


@pytest.mark.parametrize(("make", "status"), [(Late, 504), (lambda: FakeRequestError("item", 0, "wrong"), 422)])
def test_a_request_that_failed_is_freed_at_once(make, status):
    queue = Failing(make)
    scorer = type("Scorer", (), {"manifest": MANIFEST})
    app = App("ctr", lambda: scorer, queue, Metrics(), Limits(80.0, 1000))
    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(status_of(app)) == status
        assert [made() for made in queue.made] == [None]
    finally:
        gc.enable()

"""Speaks HTTP: decodes requests, refuses at once what cannot be served, hands the rest to the queue, words answers.

Health and metadata are at the paths of the Open Inference Protocol v2. There is neither TLS nor login: both are a
proxy's job (docs/serving.md).
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
import typing

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import gpsd_dist
from gpsd_dist.serving import messages
from gpsd_dist.serving.metrics import Metrics
from gpsd_dist.serving.queue import TokenQueue, Waiting
from gpsd_dist.serving.scoring_thread import Late

log = logging.getLogger(__name__)
_READ_TIMEOUT_S = 10  # for a whole body; untuned
_JSON = "application/json"


class Refusal(Exception):
    """Raised for a request that gets another status than 200."""

    def __init__(self, status: int, error: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(error)
        self.status, self.error, self.headers = status, error, headers


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds what one request may ask of the server."""

    deadline_ms: float
    max_body_bytes: int


class App:
    """Holds the handlers of one process; `asgi` is the application."""

    def __init__(
        self,
        name: str,
        scorer: typing.Callable[[], typing.Any],
        queue: TokenQueue,
        metrics: Metrics,
        limits: Limits,
    ) -> None:
        self.name, self.scorer, self.queue, self.metrics, self.limits = name, scorer, queue, metrics, limits
        self.is_ready = True
        self._refused = -1, 0
        """`queue.num_taken`, and the bytes of a body that did not fit into the queue then."""
        self._body = msgspec.json.Decoder(messages.bounded_body(queue.max_tokens))
        routes = [
            Route("/v1/score", self.score, methods=["POST"]),
            Route("/v2", self.server_metadata),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/v2/models/{name}", self.model_metadata),
            Route("/v2/models/{name}/ready", self.model_ready),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.openapi),
        ]
        starlette = Starlette(routes=routes, exception_handlers={HTTPException: self._http_error})
        starlette.router.redirect_slashes = False
        self.asgi = _closing_unread(starlette)

    async def score(self, request: Request) -> Response:
        """Answers `POST /v1/score`."""
        arrived_s = time.monotonic()
        try:
            response = _json(200, await self._score(request, arrived_s))
        except Refusal as refusal:
            response = _refused(refusal.status, messages.Refused(refusal.error), refusal.headers)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; it is counted
        except asyncio.CancelledError:  # uvicorn's, at the end of --drain_s; passed on, it would log a traceback
            draining = messages.Refused("the server ends, and the request was not complete: ask another replica")
            response = _refused(503, draining)
        except Exception as error:
            response = self._failed(error)
            # Its frames hold the future that holds it: a request in such a cycle stays until garbage is collected,
            # which takes 10 ms under overload.
            error.__traceback__ = None
        self.metrics.answered(response.status_code)
        return response

    async def _score(self, request: Request, arrived_s: float) -> messages.Scored:
        body = await self._read(request)
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != _JSON:
            raise Refusal(415, f"content-type {content_type[:80]!r} is not {_JSON}")
        self._refuse_if_full(len(body))
        started_s = time.perf_counter()
        requests = self._decode(body)
        num_tokens = sum(_num_tokens(raw, self.scorer().manifest.item_feature) for raw in requests)
        self.metrics.observe("decode", time.perf_counter() - started_s)
        if num_tokens > self.queue.max_tokens:
            raise Refusal(413, f"{num_tokens:,} tokens in a body, at most {self.queue.max_tokens:,}: send several")
        loop = asyncio.get_running_loop()
        answered = loop.create_future()

        def reply(result: typing.Any) -> None:
            loop.call_soon_threadsafe(_settle, answered, result)

        deadline_s = arrived_s + self.limits.deadline_ms / 1000
        num_taken = self.queue.num_taken
        if not self.queue.offer(Waiting(requests, num_tokens, arrived_s, deadline_s, reply)):
            self._refused = num_taken, len(body)
            raise _busy()
        return messages.Scored(self.name, await answered)

    def _refuse_if_full(self, num_bytes: int) -> None:
        """Refuses a body that is not decoded yet: the queue is full, or a body not longer than this did not fit in."""
        num_taken, refused_bytes = self._refused
        nothing_left_since = num_taken == self.queue.num_taken and num_bytes >= refused_bytes
        if nothing_left_since or self.queue.num_tokens >= self.queue.max_tokens:
            raise _busy()

    async def _read(self, request: Request) -> bytes:
        """Reads a whole body. Refusal if it is too long (before it is there, if its length is announced) or too slow.

        Refusals of other kinds come after this, so that the connection can be used again; `_closing_unread` says why.
        """
        limit, parts, size = self.limits.max_body_bytes, [], 0
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise Refusal(413, f"body of {announced} bytes, at most {limit:,}")
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise Refusal(413, f"body of more than {limit:,} bytes")
                    parts.append(part)
        except TimeoutError as error:
            raise Refusal(408, f"the body did not come within {_READ_TIMEOUT_S} s") from error
        return b"".join(parts)

    def _decode(self, body: bytes) -> list[dict[str, typing.Any]]:
        try:
            requests: list[dict[str, typing.Any]] = self._body.decode(body).requests  # type: ignore[attr-defined]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            if messages.has_too_many(error):
                raise Refusal(413, f"over {self.queue.max_tokens:,} requests in a body: send several") from error
            raise Refusal(400, f'no JSON of the form {{"requests": [{{...}}]}}: {error}') from error
        if not requests:
            raise Refusal(422, "requests is empty; send one or more")
        return requests

    def _failed(self, error: Exception) -> Response:
        if isinstance(error, Late):
            waited = f"not scored within {self.limits.deadline_ms:g} ms: the server is overloaded"
            return _refused(504, messages.Refused(waited))
        if hasattr(error, "column") and hasattr(error, "row"):  # serving.requests.RequestError
            return _refused(422, messages.Refused(str(error), error.column, error.row))
        log.error("a request failed", exc_info=error)
        return _refused(500, messages.Refused("the server failed on this request; its log says why"))

    async def live(self, request: Request) -> Response:
        """Says that the event loop runs."""
        return _json(200, {"live": True})

    async def ready(self, request: Request) -> Response:
        """Says whether requests should be sent here: not while draining."""
        return _json(200 if self.is_ready else 503, {"ready": self.is_ready})

    async def model_ready(self, request: Request) -> Response:
        """Says the same of a model by name."""
        self._check_name(request)
        return await self.ready(request)

    async def model_metadata(self, request: Request) -> Response:
        """Describes version, columns and tasks."""
        self._check_name(request)
        return _json(200, messages.model_metadata(self.name, self.scorer()))

    async def server_metadata(self, request: Request) -> Response:
        """Names the server."""
        return _json(200, messages.ServerMetadata("gpsd_dist", gpsd_dist.__version__, []))

    async def show_metrics(self, request: Request) -> Response:
        """Shows the metrics in Prometheus' text format."""
        self.metrics.queue_tokens.set(self.queue.num_tokens)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """Shows the OpenAPI document."""
        return Response(json.dumps(messages.openapi(self.scorer().manifest), indent=1), media_type=_JSON)

    def _check_name(self, request: Request) -> None:
        if request.path_params["name"] != self.name:
            raise HTTPException(404, f"no model of this name; it is {self.name!r}")

    async def _http_error(self, request: Request, error: Exception) -> Response:
        """Words starlette's own refusals (unknown path, wrong method) like ours."""
        assert isinstance(error, HTTPException)
        with contextlib.suppress(Refusal, ClientDisconnect, asyncio.CancelledError):
            await self._read(request)  # a connection that is closed while the client still sends may lose the answer
        return _refused(error.status_code, messages.Refused(error.detail), dict(error.headers or {}))


def _closing_unread(asgi: ASGIApp) -> ASGIApp:
    """Wraps an application: an answer that comes before the end of the request's body closes the connection.

    uvicorn stops the keep-alive timer of a connection with each piece of the body that comes after the answer, and
    starts it again with the next answer only, so such a connection would stay open as long as the client likes.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        is_read = all(
            name != b"transfer-encoding" and (name != b"content-length" or n == b"0") for name, n in scope["headers"]
        )

        async def noting() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_read:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await asgi(scope, noting, closing)

    return wrapped


def _settle(answered: asyncio.Future, result: typing.Any) -> None:
    if answered.done():
        return
    if isinstance(result, Exception):
        answered.set_exception(result)
    else:
        answered.set_result(result)


def _busy() -> Refusal:
    return Refusal(503, "the queue is full: ask again later, or another replica", {"Retry-After": "1"})


def _num_tokens(raw: dict[str, typing.Any], item: str) -> int:
    """Counts events and candidates of a request that nobody has checked yet; at least 1."""
    columns = (raw.get(f"{place}.{item}") for place in ("history", "candidate"))
    return max(1, sum(len(column) for column in columns if isinstance(column, list)))


def _json(status: int, content: typing.Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, _JSON)


def _refused(status: int, refused: messages.Refused, headers: dict[str, str] | None = None) -> Response:
    return _json(status, refused, headers)

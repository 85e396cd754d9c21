"""Defines what goes over HTTP, and makes the OpenAPI document of it."""

import typing

import msgspec

from gpsd_dist.schema import Feature, Manifest
from gpsd_dist.serving.answer import Answer

_SHOWN = ("created", "source", "packages", "engine", "tolerance", "limits")  # of artefact.json
RawId = str | int | float | bool | None
Seconds = int | float | None  # since 1970
PATHS = {  # path -> (method, summary, status of success, its type)
    "/v1/score": ("post", "Score the candidates of raw requests", "Scored"),
    "/v2": ("get", "Name and version of the server", "ServerMetadata"),
    "/v2/health/live": ("get", "Is the process alive?", None),
    "/v2/health/ready": ("get", "Should requests be sent here?", None),
    "/v2/models/{name}": ("get", "Version, columns and tasks of the model", "ModelMetadata"),
    "/v2/models/{name}/ready": ("get", "Should requests for this model be sent here?", None),
    "/metrics": ("get", "Prometheus' text format", None),
    "/openapi.json": ("get", "This document", None),
}
REFUSALS = {
    "400": "The body is no JSON of this form",
    "408": "The body did not come in time",
    "413": "The body, or the number of tokens in it, is over a limit",
    "415": "The body is not application/json",
    "422": "A column is missing, unknown, of another type or over a limit; `column` and `row` say which",
    "500": "The server failed; its log says why",
    "503": "The queue is full, or the server drains: wait `Retry-After` seconds, or ask another replica",
    "504": "The deadline passed before the request's turn came; nothing was computed",
}


class ScoreBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/score`."""

    requests: list[dict[str, typing.Any]]


def bounded_body(max_requests: int) -> type[msgspec.Struct]:
    """Makes a `ScoreBody` whose decoder stops at so many requests, before it has built objects of all of them."""
    bounded = typing.Annotated[list[dict[str, typing.Any]], msgspec.Meta(max_length=max_requests)]
    return msgspec.defstruct("ScoreBody", [("requests", bounded)], forbid_unknown_fields=True)


def has_too_many(error: Exception) -> bool:
    """Says whether a decoder refused a body for the number of its requests."""
    return isinstance(error, msgspec.ValidationError) and str(error).startswith("Expected `array` of length <=")


class Scored(msgspec.Struct):
    """Answer of `POST /v1/score`: one entry of `answers` per request, scores in the order of its candidates."""

    model: str
    answers: list[Answer]


class Refused(msgspec.Struct, omit_defaults=True):
    """Answer of every other status."""

    error: str
    column: str | None = None
    row: int | None = None
    """Number of the request in the body"""


class ServerMetadata(msgspec.Struct):
    """Answer of `/v2` (Open Inference Protocol v2)."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(msgspec.Struct):
    """Describes a column or a score (Open Inference Protocol v2)."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    """Answer of `/v2/models/<name>` (Open Inference Protocol v2)."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, typing.Any]


def model_metadata(name: str, scorer: typing.Any) -> ModelMetadata:
    """Describes the version that is served."""
    inputs = [TensorMetadata("user_id", "BYTES", [1]), TensorMetadata("request_time_s", "INT64", [1])]
    inputs += [TensorMetadata(name, "FP64", [-1]) for name in ("history.time_s", "history.latest_s")]
    for place in ("history", "candidate", "context"):
        for feature in scorer.manifest.features_in(place):
            shape = ([] if place == "context" else [-1]) + ([-1] if feature.is_bag else [])
            datatype = "BYTES" if feature.kind == "categorical" else "FP32"
            inputs.append(TensorMetadata(f"{place}.{feature.name}", datatype, shape or [1]))
    outputs = [
        TensorMetadata(f"{task.name}.{what}", "FP32", [-1])
        for task in scorer.manifest.tasks
        for what in ("logit", "probability", *(("product",) if task.given else ()))
    ]
    shown = {key: scorer.metadata[key] for key in _SHOWN if key in scorer.metadata}
    return ModelMetadata(name, [scorer.version], "gpsd_dist", inputs, outputs, shown)


def openapi(manifest: Manifest) -> dict[str, typing.Any]:
    """Builds the OpenAPI 3.1 document for a data set's columns."""
    raw_request = raw_request_type(manifest)
    types = [ScoreBody, Scored, Refused, ServerMetadata, ModelMetadata, raw_request]
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schemas["ScoreBody"]["properties"]["requests"]["items"] = _ref(raw_request.__name__)
    paths = {path: {entry[0]: _operation(path, *entry[1:])} for path, entry in PATHS.items()}
    info = {"title": "gpsd_dist", "version": "1", "description": f"Scores for the data set {manifest.source!r}"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _operation(path: str, summary: str, answer: str | None) -> dict[str, typing.Any]:
    content = {"content": {"application/json": {"schema": _ref(answer)}}} if answer else {}
    operation: dict[str, typing.Any] = {"summary": summary, "responses": {"200": {"description": "ok"} | content}}
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if path == "/v1/score":
        body = {"required": True, "content": {"application/json": {"schema": _ref("ScoreBody")}}}
        refused = {"content": {"application/json": {"schema": _ref("Refused")}}}
        operation["requestBody"] = body
        operation["responses"] |= {status: {"description": text} | refused for status, text in REFUSALS.items()}
    elif path.endswith("/ready"):
        operation["responses"]["503"] = {"description": "The server drains"}
    return operation


def raw_request_type(manifest: Manifest) -> type[msgspec.Struct]:
    """Makes the type of one raw request: the Parquet columns, with raw ids and values in them."""
    item = manifest.item_feature
    columns: list[tuple[str, typing.Any, bool]] = [  # name, type, is required
        ("user_id", RawId, False),
        ("request_time_s", Seconds, False),
        ("history.time_s", list[Seconds], False),
        ("history.latest_s", list[Seconds], False),
    ]
    for place in ("history", "candidate", "context"):
        for feature in manifest.features_in(place):
            column = _column_type(feature)
            is_required = feature.name == item and place != "context"
            columns.append((f"{place}.{feature.name}", column if place == "context" else list[column], is_required))
    columns.sort(key=lambda column: not column[2])
    fields = [
        (f"column_{number}", kind if is_required else kind | None, msgspec.field(name=name))
        if is_required
        else (f"column_{number}", kind | None, msgspec.field(name=name, default=None))
        for number, (name, kind, is_required) in enumerate(columns)
    ]
    return msgspec.defstruct("RawRequest", fields, forbid_unknown_fields=True)


def _column_type(feature: Feature) -> typing.Any:
    if feature.kind == "numerical":
        return float | None
    return list[RawId] | None if feature.is_bag else RawId

"""Makes raw requests of a given size for an artefact: known ids drawn anew, other values as in its examples."""

import json
import pathlib
import random
import typing

import pyarrow.parquet as pq

from gpsd_dist.serving.examples import REQUESTS_NAME


def make_requests(scorer: typing.Any, history: int, candidates: int, count: int, seed: int = 0) -> list[dict]:
    """Draws `count` requests of `history` events and `candidates` candidates each.

    Ids of items come from the artefact's vocabulary (as many different rows as real traffic has, or more), or from its
    examples where the table has none. Every other column that must be sent repeats values of the examples. Attributes
    of items are not sent: the artefact has them.
    """
    rng = random.Random(seed)
    examples = [_needed(scorer, example) for example in scorer.artefact.read_json(REQUESTS_NAME)["requests"]]
    items = _known_items(scorer, examples)
    request_time_s = max(example["request_time_s"] or 0 for example in examples)
    sizes = {"history": history, "candidate": candidates}
    made = []
    for number in range(count):
        request = dict(rng.choice(examples)) | {"user_id": f"u{number}", "request_time_s": request_time_s}
        for column in [name for example in examples for name in example]:
            place = column.partition(".")[0]
            if place in sizes:
                request[column] = [_value(examples, column, rng) for _ in range(sizes[place])]
        for place, size in sizes.items():
            request[f"{place}.{scorer.manifest.item_feature}"] = [rng.choice(items) for _ in range(size)]
        request["history.time_s"] = sorted(
            rng.randrange(request_time_s - 10**6, request_time_s) for _ in range(history)
        )
        made.append(request)
    return made


def bodies(requests: list[dict]) -> list[bytes]:
    """Encodes one body per request."""
    return [json.dumps({"requests": [request]}).encode() for request in requests]


def _needed(scorer: typing.Any, example: dict) -> dict:
    attributes = {feature.name for feature in scorer.manifest.features if scorer.reader.is_attribute(feature)}
    return {name: value for name, value in example.items() if name.partition(".")[2] not in attributes}


def _value(examples: list[dict], column: str, rng: random.Random) -> typing.Any:
    values = rng.choice(examples).get(column)
    return rng.choice(values) if values else None


def _known_items(scorer: typing.Any, examples: list[dict]) -> list[str]:
    table = scorer.manifest.feature(scorer.manifest.item_feature).table
    path = pathlib.Path(scorer.artefact.folder) / f"vocab/{table}.parquet"
    if path.is_file():
        return [raw for raw in pq.read_table(path, columns=["raw_id"])["raw_id"].to_pylist() if raw is not None]
    column = f"candidate.{scorer.manifest.item_feature}"
    return [raw for example in examples for raw in example[column] if raw is not None]

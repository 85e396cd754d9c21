"""Compares a served artefact with `evaluate`: raw requests go to a real server, the rows they come from to the run."""

import collections.abc
import contextlib
import http.client
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import torch

from gpsd_dist.assembly import assemble
from gpsd_dist.checkpoint.loading import load_tensors
from gpsd_dist.commands import search_path
from gpsd_dist.data.loader import Loader
from gpsd_dist.data.loaders import evaluation_loader
from gpsd_dist.distributed.runtime import Runtime, process_group
from gpsd_dist.export.raw_requests import RawRequests, Request
from gpsd_dist.export.source import Source
from gpsd_dist.serving.examples import largest_distance

_START_S, _ANSWER_S, _REQUESTS_A_BODY = 600.0, 60.0, 10
Logits = dict[str, np.ndarray]
"""Task -> one logit per candidate of a request."""


def largest_difference(source: Source, artefact: pathlib.Path, split: str, count: int) -> tuple[int, int, float]:
    """Scores the first requests of a split both ways: (requests, logits, largest distance of a logit).

    ValueError where the data keep no raw ids, or the server refuses a request; OSError if it does not start.
    """
    if source.manifest.unbounded:
        raise ValueError(f"tables {sorted(source.manifest.unbounded)} keep no raw ids, so no raw requests can be made")
    requests = list(itertools.islice(_raw_requests(source, split), count))
    with served(artefact) as port:
        answers = [logits for body in _bodies(requests) for logits in _post(port, body)]
    with process_group(int(_START_S)) as runtime:
        expected = list(itertools.islice(evaluated(source, split, runtime), count))
    differences = [
        largest_distance(found[task], logit_K)
        for found, logits in zip(answers, expected, strict=True)
        for task, logit_K in logits.items()
    ]
    return (
        len(requests),
        sum(len(v) for logits in expected for v in logits.values()),
        float(np.max(differences, initial=0)),
    )


def evaluated(source: Source, split: str, runtime: Runtime) -> collections.abc.Iterator[Logits]:
    """Yields the logits of each request, in file order, as `gpsd_dist.evaluate` computes them. Collective."""
    components = assemble(source.run, source.manifest, runtime)
    load_tensors(source.checkpoint, components.weights())
    components.model.eval()
    for (host_batch,) in evaluation_loader(source.run, source.manifest, components.lookup_names, split, runtime):
        (batch,) = components.ids.assign((host_batch,))
        with torch.no_grad():
            logits = components.model(components.tables(batch.lookup), batch)
        cuts = np.cumsum(batch.packing.candidate_count_B)[:-1]
        parts = {task: np.split(logit_C.numpy(), cuts) for task, logit_C in logits.items()}
        for place in np.argsort(batch.source_row_B.numpy()):
            yield {task: found[place] for task, found in parts.items()}


def _raw_requests(source: Source, split: str) -> collections.abc.Iterator[Request]:
    convert = RawRequests(pathlib.Path(source.run.data_dir), source.manifest)

    def make(rows: pa.Table, key: object) -> list[Request]:
        return convert(rows).to_pylist()

    batches = Loader(source.run.data_dir, source.manifest, split, make_batch=make, global_batch_rows=64, shuffle=False)
    yield from itertools.chain.from_iterable(batches)


@contextlib.contextmanager
def served(artefact: pathlib.Path) -> collections.abc.Iterator[int]:
    """Starts a server on a free port of this machine; gives the port. OSError if it does not get ready."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "server.log"
        command = [sys.executable, "-m", "gpsd_dist.serve", str(artefact), "--port", "0", "--deadline_ms", "60000"]
        environment = os.environ | search_path()
        with output.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as server:
            try:
                until_s = time.monotonic() + _START_S
                while not (found := re.search(r"ready: .*:(\d+)$", output.read_text(), re.MULTILINE)):
                    if server.poll() is not None:
                        raise OSError(f"the server did not start: {output.read_text()[-2000:]}")
                    if time.monotonic() > until_s:
                        raise OSError(f"the server was not ready within {_START_S:.0f} s: is the machine overloaded?")
                    time.sleep(0.05)
                yield int(found[1])
            finally:
                server.terminate()


def _bodies(requests: list[Request]) -> collections.abc.Iterator[bytes]:
    for start in range(0, len(requests), _REQUESTS_A_BODY):
        yield json.dumps({"requests": requests[start : start + _REQUESTS_A_BODY]}).encode()


def _post(port: int, body: bytes) -> list[Logits]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/score", body, {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    if response.status != 200:
        raise ValueError(f"the server answered {response.status}: {content[:1000].decode(errors='replace')}")
    tasks = (answer["tasks"] for answer in json.loads(content)["answers"])
    return [{task: np.array(columns["logit"], np.float32) for task, columns in found.items()} for found in tasks]

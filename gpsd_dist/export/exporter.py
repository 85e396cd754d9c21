"""Writes a version of an artefact from a checkpoint of a finetuned run and the data that it was trained on."""

import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import typing

import numpy as np
from safetensors.torch import save_file

from gpsd_dist.checkpoint import integrity, manager
from gpsd_dist.checkpoint.files import Reader
from gpsd_dist.checkpoint.state import read_run
from gpsd_dist.config import run_config_from_dict
from gpsd_dist.data.run_manifest import read_run_manifest, with_data_version
from gpsd_dist.export import gates, weights
from gpsd_dist.export.onnx_form import write_onnx
from gpsd_dist.export.options import Options
from gpsd_dist.export.parquet_tokens import read_split
from gpsd_dist.export.raw_requests import examples
from gpsd_dist.export.source import Source
from gpsd_dist.export.vocabularies import write_vocabularies
from gpsd_dist.serving import counters, drift
from gpsd_dist.serving.artefact import VERSIONS, ArtefactError, drafting, make_current, open_version
from gpsd_dist.serving.drift import STATISTICS_NAME
from gpsd_dist.serving.examples import EXPECTED_NAME, REQUESTS_NAME, replay, tensors_of
from gpsd_dist.serving.requests import Limits
from gpsd_dist.serving.scorer import Scorer
from gpsd_dist.serving.tokens import Tokens
from gpsd_dist.stages.registry import find
from gpsd_dist.trained_run import check_same_schema, version_for

log = logging.getLogger(__name__)
TOLERANCE = 1e-5
DEFAULT = Options()
_STATISTICS_BATCHES = 8  # of 256 requests
_PACKAGES = ("torch", "numpy", "pyarrow", "safetensors")
_NO_DATA: dict[str, typing.Any] = {"splits": (), "sources": (), "skipped": {}, "command": ""}
_READ_BY_SERVING = ("split_rule", "reading")
"""Options of the build of the data that say how requests are read."""


def read_source(
    checkpoint: str | os.PathLike[str], data_dir: str, which: str = "best", *, with_candidates: bool = True
) -> Source:
    """Verifies a checkpoint and reads its options.

    ValueError if it is damaged, has other data, or is not of a stage that scores candidates (that ranks all items).
    """
    folder = manager.find(checkpoint, which)
    integrity.check(folder)
    for doubt in manager.doubts(folder):
        log.warning("%s", doubt)
    state = read_run(folder)
    run = run_config_from_dict(state.run_config)
    if find(run.stage).with_candidates != with_candidates:
        fix = "which scores no candidates; export a finetuned run"
        fix = fix if with_candidates else "which does not rank all items; index a pretrained run"
        raise ValueError(f"{folder} is of stage {run.stage!r}, {fix}")
    # The newest days count, so the current version comes before that of the run.
    wanted = dataclasses.replace(version_for(state, folder), first="")
    run = with_data_version(dataclasses.replace(run, data_dir=data_dir), wanted)
    manifest = read_run_manifest(run)
    check_same_schema(manifest, state.manifest, folder, run.data_dir)
    return Source(folder, state, run, manifest)


def export(source: Source, out: str | os.PathLike[str], options: Options = DEFAULT) -> str:
    """Writes a version and makes it current; returns its name.

    ValueError if it loses more than allowed, is worse than the current one, or would take counters from that. OSError
    if another export is under way.
    """
    run, manifest, data_dir = source.run, source.manifest, pathlib.Path(source.run.data_dir)
    reader = Reader(source.checkpoint)
    with drafting(out) as draft:
        counted = _counters(source, draft.root)
        weights.write_dense(draft, reader, run, manifest)
        write_vocabularies(draft, data_dir, manifest, reader)
        tables = weights.write_tables(draft, reader, run, manifest, options.table_dtype)
        facts = facts_of(source, options, tables)
        draft.write_json(STATISTICS_NAME, {})  # until there is a scorer to measure with
        scorer = Scorer(draft.preview(**facts | {"engine": "eager"}), counters=counted)
        draft.write_json(STATISTICS_NAME, _statistics(source, scorer))
        gates.check_loss(source, scorer, draft, options)
        if options.replaces_current:
            gates.check_replaces(source, scorer, out, options)
        requests = examples(data_dir, manifest, run.data.max_history_length, options.max_candidates)
        tokens = scorer.reader(scorer.reader.from_json(requests))
        save_file(tensors_of(tokens, scorer.score_tokens(tokens)), draft.folder / EXPECTED_NAME)
        draft.write_json(REQUESTS_NAME, {"requests": requests})
        if options.engine == "onnx":
            write_onnx(scorer.model, tuple(task.name for task in scorer.tasks), draft.folder)
            difference = replay(Scorer(draft.preview(**facts), counters=counted))
            log.info("onnx: logits of the examples differ from those of torch by %.2g", difference)
        version = draft.commit(**facts)
        added = draft.new_blob_bytes
        if counted is not None:  # last of all: what is refused changes nothing
            counters.publish(draft.root, counted)
    make_current(out, version)
    log.info("%s/%s/%s, %s bytes of tables added", out, VERSIONS, version, f"{added:,}")
    return version


def _counters(source: Source, root: pathlib.Path) -> counters.Counters | None:
    """Makes the counters of the data; None where no feature counts. The caller has the lock of the artefact.

    ValueError if they would not serve the current version, or if newer ones that stay do not serve this one.
    """
    manifest, data_dir = source.manifest, pathlib.Path(source.run.data_dir)
    if not counters.needs(manifest):
        return None
    try:
        current = open_version(root)
    except ArtefactError:  # none yet, or a damaged one, which this export replaces
        current = None
    if current is not None:
        counters.check_covers(manifest, data_dir, current)
    made = counters.from_data(data_dir, manifest)
    counters.check_same_log(root, manifest, made)
    if counters.newer_than(root, made):
        counters.open_counters(root, manifest)
        log.info("%s keeps its counters, which end later than those of the data, as of %s", root, made.as_of)
    return made


def facts_of(source: Source, options: Options, tables: dict[str, dict[str, typing.Any]]) -> dict[str, typing.Any]:
    """Describes a version, but for its files: the fields of `Description` that `Draft.commit` takes."""
    run, manifest = source.run, source.manifest
    served = dataclasses.replace(
        manifest,
        max_history_length=min(run.data.max_history_length, manifest.max_history_length),
        options={name: value for name, value in manifest.options.items() if name in _READ_BY_SERVING},
        **_NO_DATA,
    )
    facts = {
        "source": _provenance(source),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "manifest": dataclasses.asdict(served),
        "engine": options.engine,
        "tolerance": TOLERANCE,
        "limits": dataclasses.asdict(Limits(max_candidates=options.max_candidates)),
        "tables": tables,
    }
    return json.loads(json.dumps(facts))


def _statistics(source: Source, scorer: Scorer) -> dict[str, typing.Any]:
    """Measures a sample of the training split."""
    rows = read_split(source.run, source.manifest, "train", gates.managed(scorer), shuffle=True)
    tokens = Tokens.concat([part.tokens for part in itertools.islice(rows, _STATISTICS_BATCHES)])
    lists = {"history_length": tokens.history_length_B, "candidates": tokens.candidate_count_B}
    for feature in (f for f in source.manifest.features if f.table is None):
        lists[f"standardised {feature.name}"] = np.concatenate(
            [tokens.columns[p][feature.name] for p in feature.places]
        )
    return {
        "requests": len(tokens),
        "means": drift.means(source.manifest, tokens, scorer.score_tokens(tokens)),
        "quantiles": {name: drift.quantiles(values) for name, values in lists.items()},
    }


def _provenance(source: Source) -> dict[str, typing.Any]:
    """Says what a version was made of. Commit and versions of the training are there if its run folder is."""
    folder = pathlib.Path(str(source.checkpoint))
    described = folder.parents[1] / "environment.json"
    training = json.loads(described.read_text()) if described.is_file() else {}
    return {
        "checkpoint": str(source.checkpoint),
        "step": source.state.step,
        "metrics": source.state.metrics,
        "run": {"stage": source.run.stage, "strategy": source.run.strategy, "seed": source.run.seed},
        "data": {"folder": source.run.data_dir, "source": source.manifest.source},
        "training": {key: training.get(key) for key in ("commit", "versions", "device", "world_size")},
    }

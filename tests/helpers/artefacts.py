"""An artefact made by hand, without a training: the tiny data, a Transformer with random weights."""

import dataclasses
import json
import pathlib

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from gpsd_dist.config import ModelConfig, TablesConfig
from gpsd_dist.export.raw_requests import examples
from gpsd_dist.export.vocabularies import read_vocabulary
from gpsd_dist.features import id_of
from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.schema import NUM_RESERVED_ROWS, Feature, write_manifest
from gpsd_dist.serving import counters
from gpsd_dist.serving.artefact import drafting, make_current
from gpsd_dist.serving.drift import STATISTICS_NAME
from gpsd_dist.serving.examples import EXPECTED_NAME, REQUESTS_NAME, tensors_of
from gpsd_dist.serving.items import Items
from gpsd_dist.serving.requests import Limits
from gpsd_dist.serving.scorer import ITEMS_NAME, MODEL_NAME, TOWER_NAME, Scorer, index_name
from gpsd_dist.serving.tables import write_part
from gpsd_dist.serving.vocabulary import Vocabulary
from tests.helpers.synthetic import write_dataset

COUNTS = tuple(
    Feature(f"count_total_{name}", ("candidate",), "numerical", counts=name, log=True) for name in ("item", "category")
)


def write_artefact(root: pathlib.Path, data_dir: pathlib.Path, *, seed: int = 0, counts: bool = False) -> str:
    """Writes the data set and a version, and makes it current; returns the version's name.

    `counts`: the model reads COUNTS, of the events that are in `data_dir`/counters already.
    """
    manifest = dataclasses.replace(write_dataset(data_dir, seed=0, num_rows=12, max_history_length=6), sources=())
    if counts:
        manifest = dataclasses.replace(manifest, features=(*manifest.features, *COUNTS))
        write_manifest(manifest, data_dir)
    counted = counters.from_data(data_dir, manifest) if counts else None
    torch.manual_seed(seed)
    model, tables = ModelConfig(layers=1, width=16, heads=2, context_dim=4), TablesConfig(embedding_dim=16)
    tables = dataclasses.replace(tables, small_table_max_rows=50)
    looked_up, tasks = (manifest.table("item"),), tuple(task.name for task in manifest.tasks)
    ranking = RankingModel(manifest, tables, model, looked_up, tasks)
    with drafting(root) as draft:
        (draft.folder / "vocab").mkdir()
        for table in manifest.tables:
            rows = np.arange(NUM_RESERVED_ROWS, table.num_rows)
            raw: pa.StringArray = read_vocabulary(data_dir, table)
            Vocabulary.write(draft.folder / index_name(table.name), id_of(raw), rows)
        Items.write(draft.folder / ITEMS_NAME, data_dir / "items.parquet", manifest)
        save_file(dict(ranking.state_dict()), draft.folder / TOWER_NAME)
        options = {"model": dataclasses.asdict(model), "tables": dataclasses.asdict(tables), "tasks": tasks}
        draft.write_json(MODEL_NAME, options)
        draft.write_json(STATISTICS_NAME, {"means": {"candidates": 2.5}})
        weight = torch.randn(looked_up[0].num_rows, 16)
        blobs = [draft.add_blob(lambda path, part=part: write_part(part, "int8", path)) for part in weight.split(150)]
        facts = {
            "source": {"step": 3},
            "packages": {"torch": torch.__version__},
            "manifest": dataclasses.asdict(dataclasses.replace(manifest, splits=())),
            "engine": "eager",
            "tolerance": 1e-5,
            "limits": dataclasses.asdict(Limits(max_candidates=10)),
            "tables": {"item": {"dtype": "int8", "num_rows": len(weight), "width": 16, "blobs": blobs}},
        }
        facts = json.loads(json.dumps(facts))
        scorer, requests = Scorer(draft.preview(**facts), counters=counted), examples(data_dir, manifest, 6, 10)
        tokens = scorer.reader(scorer.reader.from_json(requests))
        save_file(tensors_of(tokens, scorer.score_tokens(tokens)), draft.folder / EXPECTED_NAME)
        draft.write_json(REQUESTS_NAME, {"requests": requests})
        version = draft.commit(**facts)
        if counted is not None:
            counters.publish(draft.root, counted)
    make_current(root, version)
    return version

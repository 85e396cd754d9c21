"""Scores every candidate of a split with a trained run, under one rank or many.

Every rank writes the rows that it scored to a file of its own, and `predictions.json` appears when all are there.

Shape letters: B requests, C candidates of a batch.
"""

import hashlib
import json
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gpsd_dist import schema
from gpsd_dist.batch.batch import Batch
from gpsd_dist.batch.row_layout import ranges
from gpsd_dist.checkpoint import integrity, storage
from gpsd_dist.data.gather import one_chunk
from gpsd_dist.data.loaders import evaluation_loader
from gpsd_dist.data.parquet_dataset import ParquetSplit
from gpsd_dist.data.row_order import EpochOrder
from gpsd_dist.disk.reading import NotReadableNow, again
from gpsd_dist.disk.writing import replacing
from gpsd_dist.distributed.collectives import all_gather_rows
from gpsd_dist.distributed.main_rank import on_main
from gpsd_dist.distributed.matmul_dtype import autocast
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.predict.output import SUMMARY_NAME, number_fields
from gpsd_dist.serving.request_files import claim
from gpsd_dist.stages.finetune import Finetune
from gpsd_dist.trained_run import TrainedRun

FIRST_COLUMNS = (
    pa.field("user_id", pa.string()),
    pa.field("request", pa.int64()),
    pa.field("request_time_s", pa.int64()),
    pa.field("item_id", pa.string()),
    pa.field("item_index", pa.int64()),
    pa.field("checkpoint", pa.dictionary(pa.int32(), pa.string())),
)
"""First columns, one row per candidate, in the order of the split.

`request`: row of the split, from 0. `item_id`: the raw id; null if the vocabulary lacks the item, or the table has no
vocabulary. `item_index`: row of the item table, or the 60-bit id. `checkpoint`: step and content of what scored. Then
come, for each task, `<task>.logit`, `<task>.probability` (of a conditional task: given that the other label is 1),
`<task>.product` (conditional tasks alone: that both labels are 1) and `<task>.label` (null: not observed).
"""


def predict_split(
    trained: TrainedRun, split: str, out_dir: pathlib.Path, runtime: Runtime, command: str = ""
) -> dict[str, typing.Any]:
    """Scores a split into `part-<rank>.parquet` of every rank; returns the content of `predictions.json`. Collective.

    ValueError for a run that scores no candidates, or if `out_dir` has something in it.
    """
    components, stage, run = trained.components, trained.components.stage, trained.run
    if not isinstance(stage, Finetune):
        raise ValueError(
            f"{trained.folder} was pretrained: it ranks all items and scores no candidates; "
            "predict with a finetuned run"
        )
    on_main(lambda: claim(out_dir))
    version = f"step {trained.step}, {content_hash(trained.folder)}"
    make_rows = _RowMaker(trained, split, stage, version, runtime)
    name = f"part-{runtime.rank:05d}.parquet"
    components.model.eval()
    with replacing(out_dir / name) as file, pq.ParquetWriter(file, make_rows.schema, compression="zstd") as writer:
        for (host_batch,) in evaluation_loader(run, trained.manifest, components.lookup_names, split, runtime):
            runtime.watchdog.alive()
            with torch.no_grad(), autocast(run, runtime.device):
                _, logits = stage.score(components, host_batch)
            if host_batch.packing.num_requests:
                writer.write_table(make_rows(host_batch, logits))
    counts = torch.stack(
        [part[0] for part in all_gather_rows(torch.tensor([[make_rows.requests, make_rows.candidates]]))]
    )
    summary = {
        "checkpoint": str(trained.folder),
        "version": version,
        "data": run.data_dir,
        "split": split,
        "tasks": [task.name for task in stage.tasks],
        "requests": int(counts[:, 0].sum()),
        "candidates": int(counts[:, 1].sum()),
        "files": [f"part-{rank:05d}.parquet" for rank in range(runtime.world_size)],
        "command": command,
    }
    on_main(lambda: storage.write_json(out_dir / SUMMARY_NAME, summary))
    return summary


def content_hash(checkpoint: storage.Location) -> str:
    """Returns 12 digits that differ for checkpoints of different content."""
    path = checkpoint / integrity.CHECKSUMS_NAME
    checksums = integrity.read_checksums(checkpoint)
    if checksums is None:  # written before there were checksums
        path = checkpoint / integrity.STATE_NAME
        return hashlib.sha256(storage.read_bytes(path, storage.MAX_JSON_BYTES)).hexdigest()[:12]
    sums = sorted((name, entry.sha256) for name, entry in checksums.files.items())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:12]


class _RowMaker:
    """Turns scored batches of one rank, which come in the order of the split, into rows of the file."""

    def __init__(self, trained: TrainedRun, split: str, stage: Finetune, version: str, runtime: Runtime):
        self.stage, self.version, self.requests, self.candidates = stage, version, 0, 0
        self._split = ParquetSplit(trained.run.data_dir, trained.manifest, split, ("user_id",))
        self._order = EpochOrder(self._split.group_rows_G, 0, runtime.world_size, 1, seed=0, shuffle=False)
        self._first_row = self._order.shard_start(runtime.rank)
        self._raw_item_ids = raw_item_ids(trained.run.data_dir, trained.manifest)
        self._given = {task.name: task.given for task in stage.tasks}
        fields = list(FIRST_COLUMNS)
        for task, given in self._given.items():
            fields += number_fields(task, given in self._given)
            fields.append(pa.field(f"{task}.label", pa.uint8()))
        self.schema = pa.schema(fields)

    def __call__(self, batch: Batch, logits: dict[str, torch.Tensor]) -> pa.Table:
        """Makes the rows of a batch as it was loaded (ids not yet rows) and its logits, task -> [C]."""
        # A batch is sorted by history length. `source_row_B` says where each of its requests stood in the split.
        row_B = batch.source_row_B.numpy()
        place_B = np.argsort(row_B)  # int64: place in the batch of the first, second, ... row of the split
        count_B = np.diff(batch.packing.candidate_offsets.numpy())
        first = self._first_row + self.requests
        request_C = np.repeat(first + np.arange(len(row_B)), count_B[place_B])
        order_C = ranges(batch.packing.candidate_offsets.numpy()[:-1][place_B], count_B[place_B])
        item_C = batch.candidate_item_C.numpy()[order_C]
        columns: list[pa.Array] = [
            self._user_ids(first, len(row_B)).take(pa.array(request_C - first)),
            pa.array(request_C),
            pa.array(np.repeat(batch.request_time_s_B.numpy()[place_B], count_B[place_B])),
            self._raw_ids_of(item_C),
            pa.array(item_C),
            pa.DictionaryArray.from_arrays(np.zeros(len(item_C), np.int32), [self.version]),
        ]
        probability = {task: torch.sigmoid(logits[task].double()).cpu() for task in self._given}
        for task, given in self._given.items():
            numbers = [logits[task].float().cpu(), probability[task]]
            if given in self._given:
                numbers.append(self._product(task, probability))
            columns += [pa.array(number.float().numpy()[order_C]) for number in numbers]
            label_C = batch.labels[task].numpy()[order_C]
            columns.append(pa.array(np.nan_to_num(label_C).astype(np.uint8), mask=np.isnan(label_C)))
        self.requests, self.candidates = self.requests + len(row_B), self.candidates + len(item_C)
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _product(self, task: str | None, probability: dict[str, torch.Tensor]) -> torch.Tensor:
        """Multiplies the probabilities of a task and of all that it is given."""
        product = torch.ones(())
        while task in self._given:
            product, task = product * probability[task], self._given[task]
        return product

    def _user_ids(self, first: int, count: int) -> pa.Array:
        slices = self._order.group_slices(first, first + count)
        return pa.concat_arrays(
            [one_chunk(self._split.read_group(group)["user_id"]).slice(start, num) for group, start, num in slices]
        )

    def _raw_ids_of(self, item_C: np.ndarray) -> pa.Array:
        if self._raw_item_ids is None:
            return pa.nulls(len(item_C), pa.string())
        return self._raw_item_ids.take(pa.array(item_C))


def raw_item_ids(data_dir: str | pathlib.Path, manifest: schema.Manifest) -> pa.Array | None:
    """Reads the raw id of every row of the item table, null for reserved rows; None for a table without vocabulary."""
    table = manifest.feature(manifest.item_feature).table
    assert table is not None, "items are categorical"
    if table in manifest.unbounded:
        return None
    path = pathlib.Path(data_dir) / "vocab" / f"{table}.parquet"
    try:
        vocabulary = again(path, lambda: pq.read_table(path, columns=["raw_id", "index"]))
    except NotReadableNow:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({error}); build the data set again") from error
    place = np.full(manifest.table(table).num_rows, -1)
    place[vocabulary["index"].to_numpy()] = np.arange(len(vocabulary))
    return one_chunk(vocabulary["raw_id"]).take(pa.array(place, mask=place < 0))

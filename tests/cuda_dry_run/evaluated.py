"""Runs what needs numbers on Labelled CUDA tensors: validations, predictions, managed ids, resuming, metrics.

Each result is compared with that of the same code on CPU tensors.
"""

# ruff: noqa: I001
from tests.cuda_dry_run import dry_run  # loads the shim: before torch

import contextlib
import copy
import dataclasses
import pathlib
import traceback
import typing
import unittest.mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gpsd_dist import api
from gpsd_dist.batch import transfer
from gpsd_dist.checkpoint.loading import fill_tensors
from gpsd_dist.config.ids import IdsConfig
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.export.exporter import export, read_source
from gpsd_dist.index.build import build
from gpsd_dist.metrics.ranking import RankingSums
from gpsd_dist.metrics.recorder import Recorder
from gpsd_dist.optim import WeightAverage
from gpsd_dist.predict import split
from gpsd_dist.serving import retriever, scorer
from gpsd_dist.stages import item_ranking
from gpsd_dist.stages.stage import Components, evaluate_split
from gpsd_dist.tables.id_remapping import IdRemapper
from gpsd_dist.tables.managed_collision import ManagedCollisionMap
from gpsd_dist.tables.row_reset import RowReset
from gpsd_dist.trained_run import TrainedRun
from gpsd_dist.trainer import Trainer
from tests.cuda_dry_run.labelled import CUDA, OnCuda, labelled, move, on_cuda
from tests.integration.tiny_data import step_folder, tiny_run
from tests.integration.unbounded_data import write_unbounded_data

ON_HOST, ON_CUDA = (Runtime(0, 1, 0, device) for device in (torch.device("cpu"), CUDA))
Waits = dict[str, int]


class Tables:
    """Holds whole tables on the device instead of TorchRec's."""

    first_row = 0

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weight = {name: labelled(weight) for name, weight in weights.items()}

    def __call__(self, lookup) -> dict[str, torch.Tensor]:
        sections = lookup.values().split(lookup.length_per_key())
        return {
            name: self.weight[name].roll(self.first_row, 0)[row]
            for name, row in zip(lookup.keys(), sections, strict=True)
        }


@contextlib.contextmanager
def _device(waits: Waits) -> typing.Iterator[OnCuda]:
    page_locked = unittest.mock.patch.object(transfer, "page_locked", dry_run.page_locked)
    no_driver = unittest.mock.patch("torch.cuda._lazy_init", lambda: None)
    with page_locked, no_driver, dry_run.on_fake_cuda(set()), on_cuda() as mode:
        yield mode
        waits.update(mode.waits)


def _trainer(folder: pathlib.Path, stage: str, **changes) -> Trainer:
    return Trainer(tiny_run(stage, folder / "data", folder / f"values_{stage}", **changes), ON_HOST)


def _on_cuda(components: Components, ids: IdRemapper | None = None) -> Components:
    model = copy.deepcopy(components.model)
    move(model)
    weights = {name: value.local_shards()[0].tensor for name, value in components.tables.weights().items()}
    return dataclasses.replace(
        components, tables=Tables(weights), model=model, ids=ids or components.ids, runtime=ON_CUDA
    )


def validated(trainer: Trainer, waits: Waits) -> bool:
    """Whether a validation has the metrics of the CPU, up to rounding."""
    expected = evaluate_split(trainer.run, trainer.manifest, trainer.components, "valid")
    components = _on_cuda(trainer.components)
    with _device(waits):
        found = evaluate_split(trainer.run, trainer.manifest, components, "valid")
    flat = [{(t, k): v for t, values in part.items() for k, v in values.items()} for part in (expected, found)]
    assert flat[0].keys() == flat[1].keys()
    return all(a == b or abs(a - b) < 1e-5 or (a != a and b != b) for a, b in zip(*map(dict.values, flat), strict=True))


def averaged(trainer: Trainer, waits: Waits) -> bool:
    """Whether the mean of the weights, in their place, has the metrics of the CPU, and other ones than the weights."""
    last = evaluate_split(trainer.run, trainer.manifest, trainer.components, "valid")
    with trainer.training_step.average.in_place():
        expected = evaluate_split(trainer.run, trainer.manifest, trainer.components, "valid")
    components = _on_cuda(trainer.components)
    with _device(waits):
        average = WeightAverage(components.model, 0.5)
        average.other = {name: labelled(mean) for name, mean in trainer.training_step.average.other.items()}
        with average.in_place():
            found = evaluate_split(trainer.run, trainer.manifest, components, "valid")
        again = evaluate_split(trainer.run, trainer.manifest, components, "valid")
    names = [(task, key) for task, values in expected.items() for key in values if key in ("auc", "log_loss")]
    pairs = [(found, expected), (again, last)]
    near = all(abs(a[task][key] - b[task][key]) < 1e-5 for a, b in pairs for task, key in names)
    return near and all(abs(last[task][key] - expected[task][key]) > 1e-4 for task, key in names)


@contextlib.contextmanager
def _beside_a_gpu() -> typing.Iterator[None]:
    """Lets torch say that there is a GPU; whoever asks for one gets an error, because here is no driver."""
    with contextlib.ExitStack() as stack:
        for name, answer in {"is_available": True, "device_count": 1, "is_initialized": False}.items():
            stack.enter_context(unittest.mock.patch(f"torch.cuda.{name}", lambda answer=answer: answer))
        yield


def indexed(folder: pathlib.Path) -> bool:
    """Whether a pretrained run is indexed, and searched as the index says that it should be, on the CPU alone."""
    with _beside_a_gpu():
        build(folder / "values_pretrain", str(folder / "data"), folder / "index", "last")
        return retriever.load(folder / "index").version != ""


def exported(folder: pathlib.Path) -> bool:
    """Whether a finetuned run is exported, and scores as the artefact says that it should, on the CPU alone."""
    with _beside_a_gpu():
        export(read_source(folder / "values_finetune", str(folder / "data"), "last"), folder / "artefact")
        return len(api.load(folder / "artefact").tasks) == 2


def predicted(trainer: Trainer, folder: pathlib.Path, waits: Waits) -> bool:
    """Whether predictions have the rows of the CPU, numbers up to rounding."""
    parts = []
    for name, components, runtime in (("host", trainer.components, ON_HOST), ("cuda", None, ON_CUDA)):
        components = components or _on_cuda(trainer.components)
        trained = TrainedRun(trainer.run, trainer.manifest, components, folder, 0)
        device = _device(waits) if runtime is ON_CUDA else contextlib.nullcontext()
        with device, unittest.mock.patch.object(split, "content_hash", lambda _: "none"):
            split.predict_split(trained, "valid", folder / f"predicted_{name}", runtime)
        parts.append(pq.read_table(folder / f"predicted_{name}/part-00000.parquet"))
    here, there = parts
    floats = [name for name in here.column_names if pa.types.is_floating(here.schema.field(name).type)]
    near = all(abs(here[name].to_numpy() - there[name].to_numpy()).max() < 1e-5 for name in floats)
    return near and len(here) > 20 and here.drop_columns(floats).equals(there.drop_columns(floats))


def remapped(folder: pathlib.Path, waits: Waits) -> bool:
    """Whether managed ids get the rows that they get on the CPU, and rows that pass to another id are reset alike."""
    manifest = write_unbounded_data(folder / "data", {"item": ("managed", 20)})
    run = tiny_run("pretrain", folder / "data", folder / "run")
    trainer = Trainer(run, ON_HOST)
    steps = [parts for parts, _ in zip(iter(trainer.loader), range(3), strict=False)]
    trainer.loader.close()
    components = _on_cuda(trainer.components)
    with _device(waits):
        reset = RowReset.__new__(RowReset)  # without TorchRec's shards
        reset._table, reset._config, reset._seed = "item", run.tables, run.seed
        reset._weights, reset._state = [(0, components.tables.weight["item"])], []
        ids = IdRemapper(manifest, {"item": ManagedCollisionMap(20, IdsConfig(), CUDA)}, {"item": reset})
        found = [ids.train(transfer.to_device(transfer.pinned(parts), CUDA)) for parts in steps]
    expected = [trainer.components.ids.train(parts) for parts in steps]
    pairs = [(a.lookup.values(), b.lookup.values().inner) for x, y in zip(expected, found) for a, b in zip(x, y)]
    weight = trainer.components.tables.weights()["item"].local_shards()[0].tensor
    same = all(torch.equal(a, b) for a, b in pairs) and torch.equal(weight, reset._weights[0][1].inner)
    return same and trainer.components.ids.metrics == ids.metrics and len(pairs) == 3


def resumed(trainer: Trainer, waits: Waits) -> bool:
    """Whether a checkpoint of the CPU fills tensors on the device."""
    trainer.train()
    checkpoint = step_folder(trainer.run.output_dir, trainer.step)
    state = dict(trainer.model.state_dict())
    blank = {name: labelled(torch.zeros_like(value)) for name, value in state.items()}
    with _device(waits):
        fill_tensors(checkpoint, {"dense": blank})
    return all(torch.equal(blank[name].inner, value) for name, value in state.items()) and len(state) > 5


def logged(folder: pathlib.Path, waits: Waits) -> bool:
    """Whether metrics on the device are reduced, with one gather."""
    with _device(waits):
        recorder = Recorder(folder / "recorded", 0, device=CUDA)
        recorder.record("train/loss", torch.full((), 3.0, device=CUDA))
        recorder.record("train/loss", torch.full((), 5.0, device=CUDA))
        recorder.record("perf/step_ms", 7.0, reduce="last")
        found = recorder.log(1, 0.5)
        recorder.close()
    return found == {"train/loss": 4.0, "perf/step_ms": 7.0}


def results(folder: pathlib.Path) -> dict[str, dict[str, typing.Any]]:
    """Case -> whether it is right, what waited, and the error if there was one. `folder`: with the tiny data."""
    managed, found = folder / "managed", {}
    managed.mkdir()
    pretrained = _trainer(folder, "pretrain", train={"max_steps": 1})
    options = {"model": {"number_buckets": True, "matches": True}, "train": {"max_steps": 2, "average_fraction": 0.5}}
    finetuned = _trainer(folder, "finetune", **options)
    finetuned.train()
    cases: dict[str, typing.Callable[[Waits], bool]] = {
        "validation of pretraining": lambda waits: validated(pretrained, waits),
        "validation of finetuning": lambda waits: validated(finetuned, waits),
        "predictions": lambda waits: predicted(finetuned, folder, waits),
        "managed ids": lambda waits: remapped(managed, waits),
        "metrics": lambda waits: logged(folder, waits),
        "planted sums on the host": lambda waits: _with_sums_on_the_host(pretrained, waits),
        "planted wrong rows": lambda waits: _with_wrong_rows(finetuned, waits),
        "resuming": lambda waits: resumed(pretrained, waits),
        "mean of the weights": lambda waits: averaged(finetuned, waits),
        "index": lambda _: indexed(folder),
        "export and api.load": lambda _: exported(folder),
        "planted scorer on the device": lambda _: _with_a_scorer_on_the_device(folder),
    }
    for name, case in cases.items():
        waits: Waits = {}
        try:
            found[f"labelled {name}"] = {"right": case(waits), "waits": waits, "error": ""}
        except Exception as error:
            found[f"labelled {name}"] = {"right": False, "waits": waits, "error": _described(error)}
    return found


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error} at {dry_run.place(traceback.extract_tb(error.__traceback__))}"


def _with_sums_on_the_host(trainer: Trainer, waits: Waits) -> bool:
    with unittest.mock.patch.object(item_ranking, "RankingSums", lambda _: RankingSums("cpu")):
        return validated(trainer, waits)


def _with_wrong_rows(trainer: Trainer, waits: Waits) -> bool:
    with unittest.mock.patch.object(Tables, "first_row", 1):
        return validated(trainer, waits)


def _with_a_scorer_on_the_device(folder: pathlib.Path) -> bool:
    tables = lambda *_: {"item": torch.zeros(1, device="cuda")}  # noqa: E731
    with unittest.mock.patch.object(scorer, "map_tables", tables):
        return exported(folder)


def main() -> None:
    import tempfile

    import torch.distributed as dist

    folder = pathlib.Path(tempfile.mkdtemp())
    dry_run.write_data(folder / "data")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for name, result in results(folder).items():
        print(name, result)


if __name__ == "__main__":
    main()

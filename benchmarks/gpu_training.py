"""Measures training steps on one GPU: speed, MFU, memory, and where the host waits."""

import itertools
import pathlib
import statistics
import time
import typing
import warnings

import torch

from benchmarks.datasets import BenchData, prepare, without_validation
from benchmarks.gpu_bench import TRAINED, Bench, Sizes
from benchmarks.step_split import Split, split_steps
from gpsd_dist.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    TablesConfig,
    TrainConfig,
)
from gpsd_dist.config.execution import ExecutionConfig
from gpsd_dist.metrics.flops import peak_bf16_flops
from gpsd_dist.metrics.profiling import LAST_STEP
from gpsd_dist.plan.estimate import Scenario, estimate
from gpsd_dist.plan.workload import data_shape
from gpsd_dist.tables.sharding import Cluster
from gpsd_dist.trainer import Trainer


def run_config(
    data: BenchData, size: tuple[int, int, int], sizes: Sizes, option: str, folder: pathlib.Path
) -> RunConfig:
    """Configures a run in bf16; pretraining has one set of negatives for the whole batch."""
    layers, width, heads = size
    longest, is_ranking = data.source.max_history_length, data.split == "train"
    tower = {"name": option, "max_positions": longest + 11} if option in ("hstu", "sasrec") else {}
    is_frozen = option == "frozen"  # nothing is loaded: the weights stay random
    return RunConfig(
        stage="finetune" if is_ranking else "pretrain",
        strategy="ST_SF" if is_frozen else "NT",
        init_checkpoint="not-read" if is_frozen else "",
        data_dir=str(data.data_dir),
        output_dir=str(folder / "run"),
        data=DataConfig(
            max_history_length=longest,
            global_batch_rows=0,
            global_batch_tokens=sizes.tokens_per_step,
            num_threads=4,
        ),
        tables=TablesConfig(embedding_dim=width),
        model=ModelConfig(layers=layers, width=width, heads=heads, compile=option == "compile", **tower),
        pretrain=PretrainConfig(num_negative_groups=1, num_negatives=sizes.negatives, auxiliary=("category",)),
        dense=OptimizerConfig("adamw", 1e-3, weight_decay=0.1),
        train=TrainConfig(epochs=1000, bf16=True, log_interval_steps=10**6, profile=option == "profile"),
        execution=ExecutionConfig(
            activation_checkpointing=option == "activation_checkpointing",
            pipeline="sparse_dist" if option == "sparse_dist" else "plain",
            token_multiple=1024 if option == "cuda_graphs" else 0,
            cuda_graphs=option == "cuda_graphs",
        ),
    )


class Training:
    """Runs a trainer without validation, logging or saving."""

    def __init__(self, bench: Bench, size: tuple[int, int, int], option: str):
        kind = "discriminative_k2" if option in ("ranking", "frozen") else "pretrain"
        self.data = prepare(kind, "taobao_like", pathlib.Path("data"), bench.folder)
        self.run = run_config(self.data, bench.sizes.max_trained or size, bench.sizes, option, bench.folder)
        with without_validation():
            self.trainer = Trainer(self.run, bench.runtime)
        self.trainer.metrics.open(0, self.trainer.total_steps)
        self.source = self.trainer.batches()

    def steps(self) -> typing.Iterator[None]:
        """Runs steps of the real loop, loader included."""
        yield from self.train(self.source)

    def train(self, batches: typing.Iterator[tuple]) -> typing.Iterator[None]:
        """Trains on these batches, with the metrics of the real loop."""
        trainer = self.trainer
        for done in trainer.training_step.run_steps(batches, trainer.step, 10**9):
            trainer.step += 1
            trainer.metrics.record_step(done)
            trainer.profiler.after_step()
            yield

    @property
    def mean_tokens(self) -> float:
        """Real history tokens of a step; as many as fit below the bound."""
        return self.data.manifest.split(self.data.split).num_history_tokens / self.trainer.loader.steps_per_epoch

    def close(self) -> None:
        """Ends the loader's threads."""
        self.trainer.loader.close()
        self.trainer.metrics.close()


def train(bench: Bench, name: str) -> dict[str, typing.Any]:
    """Measures the speed of whole training steps."""
    _, size, *option = name.split("/")
    training = Training(bench, TRAINED[size], option[0] if option else "")
    found: dict[str, typing.Any] = {}
    try:
        if training.run.train.profile:
            training.trainer.profiler.start()
            list(itertools.islice(training.steps(), LAST_STEP))
        loop_s = timed_steps(bench, training.steps())
        if training.run.execution.pipeline == "plain":
            batches = [next(training.source) for _ in range(4)]
            tokens = statistics.mean(sum(part.num_read_tokens for part in parts) for parts in batches)
            cycled = itertools.cycle(batches)
            device_s = timed_steps(bench, training.train(cycled))
            flops = statistics.mean(training.trainer.metrics.flops(parts) or 0.0 for parts in batches)
            found |= {"device_step_ms": 1000 * device_s, "device_tokens_per_s": tokens / device_s}
            peak = peak_bf16_flops(torch.cuda.get_device_name()) if bench.is_cuda else None
            found["tflops_per_s"] = flops / device_s / 1e12
            found["mfu"] = flops / device_s / peak if peak else None
            found["step_split_ms"] = _split(bench, training)
    finally:
        training.close()
    found |= {"loop_step_ms": 1000 * loop_s, "loop_tokens_per_s": training.mean_tokens / loop_s}
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if bench.is_cuda else None
    found["planned_peak_gib"] = planned_peak_gib(bench, training)
    for page in (pathlib.Path(training.run.output_dir) / "profile").glob("summary_*.txt"):
        found["profile"] = page.read_text().splitlines()
    return found


def planned_peak_gib(bench: Bench, training: Training) -> float:
    """Asks `gpsd_dist.plan` what the run was to take; nothing is validated here."""
    run, manifest = training.run, training.data.manifest
    memory_bytes = torch.cuda.get_device_properties(0).total_memory if bench.is_cuda else 1 << 40
    shape = data_shape(run, manifest, training.data.split)
    cluster = Cluster(1, 1, bench.device.type, memory_bytes)
    memory = estimate(Scenario(run, manifest, shape, cluster)).memory
    return float((memory.held + memory.step).max()) / 2**30


def _split(bench: Bench, training: Training) -> Split:
    """Measures the phases of a step, loader included."""
    steps = training.steps()
    for _ in range(bench.sizes.warmup_steps):
        next(steps)
    bench.wait()
    return split_steps(training.trainer, lambda count: [next(steps) for _ in range(count)], bench.sizes.steps)


def timed_steps(bench: Bench, steps: typing.Iterator[typing.Any]) -> float:
    """Times seconds per step over all measured steps together: the host may run ahead of the device, as in training."""
    for _ in range(bench.sizes.warmup_steps):
        next(steps)
    bench.wait()
    begin = time.perf_counter()
    for _ in range(bench.sizes.steps):
        next(steps)
    bench.wait()
    return (time.perf_counter() - begin) / bench.sizes.steps


def host_syncs(bench: Bench, name: str) -> dict[str, typing.Any]:
    """Lists places in the package and in libraries where a step waits, with counts; the first steps are left out."""
    if not bench.is_cuda:
        return {"skipped": "CUDA alone says where it waits"}
    training = Training(bench, TRAINED["l4h256a4"], "")
    steps = training.steps()
    try:
        for _ in range(bench.sizes.warmup_steps):
            next(steps)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(bench.sizes.steps):
                next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        training.close()
    places: dict[str, float] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{warning.filename}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1 / bench.sizes.steps
    ours = sum(count for place, count in places.items() if "/gpsd_dist/" in place)
    return {"waits": ours, "waits_of_libraries": sum(places.values()) - ours, "places": places}

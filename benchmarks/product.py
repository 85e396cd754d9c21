"""The product under the clock: the real `Trainer`, step by step as in its own loop, without validation."""

import collections
import contextlib
import dataclasses
import pathlib
import time
import typing
import unittest.mock

import torch

from benchmarks.datasets import BenchData
from gpsd_dist.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    TablesConfig,
    TrainConfig,
)
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.metrics.recorder import Recorder
from gpsd_dist.trainer import Trainer

_DRAIN_S = 0.1  # longer than a batch takes to make: the loader's threads come to rest inside the block they worked for


@dataclasses.dataclass(frozen=True)
class Size:
    """l{layers}h{width}a{heads}"""

    layers: int
    width: int
    heads: int


def run_config(
    data: BenchData, size: Size, batch_rows: int, pretrain: PretrainConfig, output_dir: pathlib.Path
) -> RunConfig:
    """The official settings, from random weights, with trainable tables as wide as the tower."""
    return RunConfig(
        stage="pretrain" if data.split == "pretrain" else "finetune",
        data_dir=str(data.data_dir),
        output_dir=str(output_dir),
        data=DataConfig(max_history_length=data.source.max_history_length, global_batch_rows=batch_rows),
        tables=TablesConfig(embedding_dim=size.width),
        model=ModelConfig(layers=size.layers, width=size.width, heads=size.heads),
        pretrain=pretrain,
        dense=OptimizerConfig("adamw", 1e-3, weight_decay=0.1),
        train=TrainConfig(epochs=1000),
    )


class Product:
    """A trainer, its recorder and an endless stream of its batches."""

    def __init__(self, run: RunConfig, runtime: Runtime):
        self.trainer = Trainer(run, runtime)
        self.recorder = Recorder(run.output_dir, runtime.rank)
        self.batches = self._endless()
        self._unique_rows: list[int] = []

    def run_steps(self, count: int) -> int:
        """Trains `count` steps; returns the history tokens of their requests, each request counted once."""
        trainer, num_tokens = self.trainer, 0
        for _ in range(count):
            parts = next(self.batches)
            trainer._train_step(parts, self.recorder)
            if trainer.step % trainer.run.train.log_interval_steps == 0:
                trainer.throughput.record_to(self.recorder)
                self.recorder.log(trainer.step, trainer.step / trainer.loader.steps_per_epoch)
            self._unique_rows.append(len(parts[0].lookup.values()))
            num_tokens += sum(part.packing.num_history_tokens for part in parts)
        time.sleep(_DRAIN_S)
        return num_tokens

    def table_bytes_per_step(self) -> float:
        """Mean bytes of table rows that a step reads and, for trained tables, of their gradients and updates (a row
        read and written, its second moment too).
        """
        mean_rows = sum(self._unique_rows) / len(self._unique_rows)
        tables, module = self.trainer.run.tables, self.trainer.assembly.tables.module.module
        if module.trainable is None:
            return mean_rows * tables.frozen_columns * tables.frozen_value_bytes
        return mean_rows * (4 * 4 * tables.stored_dim + 8)

    def close(self) -> None:
        self.trainer.loader.close()
        self.recorder.close()

    def _endless(self) -> typing.Iterator[tuple]:
        while True:
            yield from self.trainer._waited(self.trainer.loader)


def split_step(product: Product, count: int) -> dict[str, float]:
    """Milliseconds of each phase of a step, mean over `count` steps.

    CPU time of the main thread, which does all the tensor work on CPU; `loader threads` is the CPU time of the others,
    `data wait` the wall time the main thread stood still for them.
    """
    timer = _PhaseTimer()
    wait_before_s = product.trainer.loader.wait_s
    with timer.installed(product.trainer):
        thread_s, process_s = time.thread_time(), time.process_time()
        product.run_steps(count)
        thread_s, process_s = time.thread_time() - thread_s, time.process_time() - process_s
    phases = dict(timer.seconds)
    phases["loss"] = phases.pop("objective") - phases["embed + tower"]
    phases["recorder, seed and the rest"] = thread_s - sum(phases.values())
    phases["loader threads"] = process_s - thread_s
    phases["data wait (wall)"] = product.trainer.loader.wait_s - wait_before_s
    return {name: 1000 * seconds / count for name, seconds in phases.items()}


class _PhaseTimer:
    """Adds up the CPU time of calls that are wrapped while it is installed."""

    def __init__(self):
        self.seconds: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> typing.Iterator[None]:
        begin = time.thread_time()
        yield
        self.seconds[name] += time.thread_time() - begin

    def timed(self, function: typing.Callable, name: str) -> typing.Callable:
        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def installed(self, trainer: Trainer) -> typing.Iterator[None]:
        step = trainer.training_step
        plain, model, optimizer = step.assembly, step.model, step.optimizer
        tables = _Timed(plain.tables, lookup=self.timed(plain.tables, "lookup"))
        objective = _Timed(plain.objective, sums=self.timed(plain.objective.sums, "objective"))
        timed_assembly = dataclasses.replace(plain, tables=tables, objective=objective)
        patches = [
            unittest.mock.patch.object(trainer.training_step, "assembly", timed_assembly),
            unittest.mock.patch.object(model, "forward", self.timed(model.forward, "embed + tower")),
            unittest.mock.patch.object(optimizer, "step", self.timed(optimizer.step, "dense optimizer")),
            unittest.mock.patch.object(
                torch.nn.utils, "clip_grad_norm_", self.timed(torch.nn.utils.clip_grad_norm_, "gradient clipping")
            ),
            unittest.mock.patch.object(
                torch.autograd, "backward", self.timed(torch.autograd.backward, "table backward + update")
            ),
            unittest.mock.patch.object(torch.Tensor, "backward", self._timed_backward()),
        ]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield

    def _timed_backward(self) -> typing.Callable:
        """`Tensor.backward` ends in `torch.autograd.backward`: its time goes to the loss's phase alone."""
        plain, inner = torch.Tensor.backward, "table backward + update"

        def call(tensor, *args, **kwargs):
            before = self.seconds[inner]
            with self.phase("backward"):
                plain(tensor, *args, **kwargs)
            self.seconds[inner] = before

        return call


class _Timed:
    """Stands in for an object, with one callable replaced."""

    def __init__(self, wrapped: typing.Any, **replaced: typing.Callable):
        self._wrapped, self._replaced = wrapped, replaced

    def __getattr__(self, name: str) -> typing.Any:
        return self._replaced.get(name) or getattr(self._wrapped, name)

    def __call__(self, *args, **kwargs) -> typing.Any:
        return self._replaced["lookup"](*args, **kwargs)

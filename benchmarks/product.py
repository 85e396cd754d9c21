"""Times the product: the real `Trainer`, step by step as in its own loop, without validation."""

import dataclasses
import pathlib
import time

from benchmarks.datasets import BenchData, without_validation
from benchmarks.step_split import OTHER_THREADS, Split, split_steps
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
from gpsd_dist.stages.stage import evaluate_split
from gpsd_dist.trainer import Trainer

_DRAIN_S = 0.1  # longer than a batch takes to make: the loader's threads come to rest inside the block they worked for


@dataclasses.dataclass(frozen=True)
class Size:
    """Names a size l{layers}h{width}a{heads}."""

    layers: int
    width: int
    heads: int
    model: str = "transformer"  # Others have sizes of their own, but for the width


def run_config(
    data: BenchData, size: Size, batch_rows: int, pretrain: PretrainConfig, output_dir: pathlib.Path
) -> RunConfig:
    """Configures the official settings, from random weights, with trainable tables as wide as the tower."""
    return RunConfig(
        stage="pretrain" if data.split == "pretrain" else "finetune",
        data_dir=str(data.data_dir),
        output_dir=str(output_dir),
        data=DataConfig(max_history_length=data.source.max_history_length, global_batch_rows=batch_rows),
        tables=TablesConfig(embedding_dim=size.width),
        model=(
            ModelConfig(layers=size.layers, width=size.width, heads=size.heads)
            if size.model == "transformer"
            else ModelConfig(size.model, width=size.width)
        ),
        pretrain=pretrain,
        dense=OptimizerConfig("adamw", 1e-3, weight_decay=0.1),
        train=TrainConfig(epochs=1000),
    )


class Product:
    """Holds a trainer and an endless stream of its batches."""

    def __init__(self, run: RunConfig, runtime: Runtime):
        with without_validation():
            self.trainer = Trainer(run, runtime)
        self.trainer.metrics.open(0, self.trainer.total_steps)
        self.batches = self.trainer.batches()
        self._unique_rows: list[int] = []

    def run_steps(self, count: int) -> int:
        """Trains `count` steps; returns the history tokens of their requests, each request counted once."""
        num_tokens = self._train(count)
        time.sleep(_DRAIN_S)
        return num_tokens

    def split_step(self, count: int) -> Split:
        """Measures the phases of a step, mean over `count` steps, and on the CPU clock what other threads did: the
        loader's, and gloo's where there are several processes. Collective, if the steps are.
        """
        thread_s, process_s = time.thread_time(), time.process_time()
        split = split_steps(self.trainer, self._train, count)
        time.sleep(_DRAIN_S)
        others_s = (time.process_time() - process_s) - (time.thread_time() - thread_s)
        if "CPU" in split:
            split["CPU"][OTHER_THREADS] = 1000 * others_s / count
        return split

    def _train(self, count: int) -> int:
        trainer, num_tokens = self.trainer, 0
        for done in trainer.training_step.run_steps(self.batches, trainer.step, count):
            trainer.step += 1
            trainer.metrics.record_step(done)
            if trainer.step % trainer.run.train.log_interval_steps == 0:
                trainer.metrics.log(trainer.step)
            self._unique_rows.append(len(done.parts[0].lookup.values()))
            num_tokens += sum(part.num_read_tokens for part in done.parts)
        return num_tokens

    def table_bytes_per_step(self) -> float:
        """Computes mean bytes of table rows that a step reads and, for trained tables, of their gradients and updates
        (a row read and written, its second moment too).
        """
        mean_rows = sum(self._unique_rows) / len(self._unique_rows)
        tables, module = self.trainer.run.tables, self.trainer.components.tables.module.module
        if module.trainable is None:
            return mean_rows * tables.stored_dim * tables.frozen_value_bytes
        return mean_rows * (4 * 4 * tables.stored_dim + 8)

    def close(self) -> None:
        self.trainer.loader.close()
        self.trainer.metrics.close()


class Evaluation:
    """Scores the rows that a product trains on: a "step" is a whole pass."""

    def __init__(self, product: Product, split: str):
        self._trainer, self._split = product.trainer, split

    def run_steps(self, count: int) -> int:
        """Makes `count` passes; returns the history tokens of their requests, each request counted once."""
        trainer = self._trainer
        for _ in range(count):
            evaluate_split(trainer.run, trainer.manifest, trainer.components, self._split)
        return count * trainer.manifest.split(self._split).num_history_tokens

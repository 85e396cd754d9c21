"""Pretrains a small Transformer on a synthetic shop, in one process and one loop, from the library's own parts.

    python -m examples.train_minimal --steps 100

`gpsd_dist.train` does the same with sharded tables, validation and checkpoints: read `gpsd_dist/training_step.py` next.
Shape letters: U distinct rows of a table that a batch needs, E embedding width, L losses of the stage.
"""

import argparse
import pathlib
import tempfile

import torch

from data_pipeline import build, synthesize
from data_pipeline.synthetic_log import SyntheticConfig
from gpsd_dist.config import DataConfig, ModelConfig, PretrainConfig, RunConfig, TablesConfig
from gpsd_dist.data import data_versions
from gpsd_dist.data.loaders import training_loader
from gpsd_dist.distributed.runtime import Runtime
from gpsd_dist.schema import read_manifest
from gpsd_dist.stages.registry import find
from gpsd_dist.tables.collections import Tables, lookup_tables

ONE_PROCESS = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def make_data(folder: pathlib.Path) -> pathlib.Path:
    """Writes the log of a shop whose customers have tastes, and prepares it; returns the folder of that version."""
    raw, data = folder / "raw", folder / "data"
    synthesize.write(SyntheticConfig(num_users=600, num_items=1600, requests_per_day=150), raw)
    status = build.main(["--source", "synthetic", "--raw_dir", str(raw), "--out_dir", str(data)])
    if status:
        raise SystemExit(status)  # the command has said why
    return data_versions.current(data)


def options(folder: pathlib.Path, data: pathlib.Path) -> RunConfig:
    """The options that gin would build from files and the command line. What is not named keeps its default."""
    return RunConfig(
        stage="pretrain",
        data_dir=str(data),
        output_dir=str(folder / "run"),
        data=DataConfig(global_batch_rows=64),
        tables=TablesConfig(embedding_dim=32),
        model=ModelConfig(layers=2, width=32, heads=4),
        pretrain=PretrainConfig(num_negatives=256, auxiliary=("category",)),
    )


def train(folder: pathlib.Path, num_steps: int) -> list[float]:
    """Returns the next-item loss of every step."""
    data = make_data(folder)
    manifest, run = read_manifest(data), options(folder, data)
    stage = find(run.stage)(run, manifest)  # the model, its losses and how it would be judged
    torch.manual_seed(run.seed)

    # Big tables are TorchRec collections, which a real run shards over ranks. Small ones are part of the model.
    big = lookup_tables(manifest, run.tables, with_candidates=stage.with_candidates)
    tables = Tables(big, frozen=(), config=run.tables, device=ONE_PROCESS.device)
    for weight in tables.parameters():
        torch.nn.init.normal_(weight, std=run.tables.init_std)
    model = stage.model(big)
    # Each row of a table is seen rarely, so it takes large steps (Adagrad); the tower takes small ones.
    optimizers = [torch.optim.Adagrad(tables.parameters(), lr=0.1), torch.optim.AdamW(model.parameters(), lr=5e-3)]
    weight_L = torch.tensor(list(stage.loss_weights.values()))

    # A batch is packed, without padding, and names the rows of big tables that it needs, negatives included.
    names = tuple(table.name for table in big)
    loader = training_loader(run, manifest, names, ONE_PROCESS, with_candidates=stage.with_candidates)
    losses: list[float] = []
    while len(losses) < num_steps:
        for (batch,) in loader:  # one epoch; a tuple, because a step may be cut into several micro-batches
            embeddings = tables(batch.lookup)  # table -> [U, E]
            sum_L = stage.loss_sums(model, embeddings, batch)
            count_L = stage.counts(batch)  # apart from the sums, so that ranks can add up both before dividing
            mean_L = sum_L / count_L.clamp(min=1)
            for optimizer in optimizers:
                optimizer.zero_grad()
            (weight_L * mean_L).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(mean_L[0].item())
            if len(losses) % 20 == 1 or len(losses) == num_steps:
                named = zip(stage.loss_weights, mean_L.tolist(), strict=True)
                print(f"step {len(losses):4d}  " + "  ".join(f"{name} {mean:.3f}" for name, mean in named))
            if len(losses) == num_steps:
                break
    loader.close()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    with tempfile.TemporaryDirectory() as scratch:
        train(pathlib.Path(scratch), parser.parse_args().steps)

"""Fits what a newcomer would write in an hour: embeddings, the mean of the history, products, an MLP.

It reads the prepared data as the boosted trees do and chooses its epoch on valid. Nothing in it is tuned to a law.

Shape letters: B requests, N candidates of a task, T history tokens, E width of an embedding.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow.compute as pc
import torch
from torch import nn

from gpsd_dist import schema
from gpsd_dist.baselines import rows
from gpsd_dist.metrics.binary_metrics import classification_metrics

WIDTH, HIDDEN, LR, BATCH_ROWS, EPOCHS = 16, 64, 2e-3, 512, 20


class MeanMLP(nn.Module):
    """Maps candidates to logits."""

    def __init__(self, table_rows: dict[str, int], features: list[str], matched: list[str], num_numbers: int):
        super().__init__()
        self.features, self.matched = features, matched
        self.tables = nn.ModuleDict({name: nn.Embedding(n, WIDTH) for name, n in table_rows.items()})
        in_width = WIDTH * (len(features) + 2 * len(matched)) + num_numbers
        self.mlp = nn.Sequential(nn.Linear(in_width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, x: dict[str, torch.Tensor], index_N: torch.Tensor) -> torch.Tensor:
        parts = [self.tables[name](x[name][index_N]) for name in self.features]
        for name in self.matched:
            token_NHE = self.tables[name](x[f"history.{name}"][x["request"][index_N]])
            is_event_NH1 = (x[f"history.{name}"][x["request"][index_N]] > 0)[:, :, None]
            mean_NE = (token_NHE * is_event_NH1).sum(1) / is_event_NH1.sum(1).clamp(min=1)
            parts += [mean_NE, mean_NE * self.tables[name](x[name][index_N])]
        return self.out(self.mlp(torch.cat([*parts, x["numbers"][index_N]], dim=1))).squeeze(1)


@dataclasses.dataclass(frozen=True)
class _Split:
    x: dict[str, torch.Tensor]
    label_N: torch.Tensor
    user_hash_N: np.ndarray

    def auc(self, model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            logit_N = model(self.x, torch.arange(len(self.label_N))).numpy()
        model.train()
        return classification_metrics(logit_N, self.label_N.numpy().astype(np.uint8), self.user_hash_N, "score")["auc"]


def score_mlp(data_dir: pathlib.Path, task: str, seed: int) -> tuple[list[list], float]:
    """Fits on train; returns (step, AUC on valid) of every epoch, and the AUC on test of the best epoch."""
    torch.manual_seed(seed)
    manifest = schema.read_manifest(data_dir)
    train, valid, test = (_read(data_dir, manifest, split, task) for split in ("train", "valid", "test"))
    features = [name for name in train.x if "." not in name and name not in ("request", "numbers")]
    matched = [name.removeprefix("history.") for name in train.x if name.startswith("history.")]
    sizes = {f.name: manifest.table(f.table).num_rows for f in manifest.features if f.table is not None}
    model = MeanMLP(sizes, features, matched, train.x["numbers"].shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    curve, best_valid, best_test, step = [], 0.0, 0.5, 0
    for _ in range(EPOCHS):
        for index_N in torch.randperm(len(train.label_N)).split(BATCH_ROWS):
            loss = nn.functional.binary_cross_entropy_with_logits(model(train.x, index_N), train.label_N[index_N])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        curve.append([step, valid.auc(model)])
        if curve[-1][1] > best_valid:
            best_valid, best_test = curve[-1][1], test.auc(model)
    return curve, best_test


def _read(data_dir: pathlib.Path, manifest: schema.Manifest, split: str, task: str) -> _Split:
    """Reads a split into tensors; histories [B, longest] are filled up with 0, which is no index."""
    used = [("candidate", f) for f in manifest.features_in("candidate")]
    used += [("context", f) for f in manifest.features_in("context") if f not in manifest.features_in("candidate")]
    shared = [f for f in manifest.features_in("candidate") if "history" in f.places and f.table is not None]
    columns = [f"{place}.{f.name}" for place, f in used] + [f"history.{f.name}" for f in shared]
    parts, num_requests = [], 0
    for batch in rows.read_batches(data_dir, manifest, split, rows.task_columns(manifest, task, columns)):
        label_N, is_used_N = rows.used_candidates(batch, manifest, task)
        num_candidates_B = rows.candidates_per_row(batch, task)
        made = {f.name: rows.per_candidate(batch[f"{p}.{f.name}"], f"{p}.{f.name}", num_candidates_B) for p, f in used}
        made |= {"label": label_N, "request": num_requests + np.repeat(np.arange(len(batch)), num_candidates_B)}
        made["user"] = np.repeat(batch["user_hash"].to_numpy(), num_candidates_B)
        made = {name: value_N[is_used_N] for name, value_N in made.items()}
        histories = {f"history.{f.name}": _padded(batch[f"history.{f.name}"], manifest) for f in shared}
        parts.append(made | histories)
        num_requests += len(batch)
    made = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    numbers = [made.pop(f.name) for _, f in used if f.table is None]
    label_N, user_hash_N = made.pop("label"), made.pop("user")
    x = {name: torch.from_numpy(np.ascontiguousarray(value, np.int64)) for name, value in made.items()}
    x["numbers"] = torch.from_numpy(np.column_stack([np.empty((len(label_N), 0)), *numbers]).astype(np.float32))
    return _Split(x, torch.from_numpy(label_N.astype(np.float32)), user_hash_N)


def _padded(column, manifest: schema.Manifest) -> np.ndarray:
    length_B = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    padded_BH = np.zeros((len(length_B), manifest.max_history_length), np.int64)
    padded_BH[np.arange(manifest.max_history_length) < length_B[:, None]] = pc.list_flatten(column).to_numpy()
    return padded_BH

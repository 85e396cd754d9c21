"""Rebuilds the scheme of the official GPSD code for comparison: the obvious form without packing or sharing.

Rows are padded to the longest allowed history, one row per (history, candidate); every sequence has its own negatives;
the item table is an ordinary `nn.Embedding` under dense AdamW; a Python loader pads row by row. Each of these can be
exchanged for what the product does, to see what it brings alone. Settings of
arXiv:2506.03699 (section 3.2 and the authors' configuration). The tower has the parameter names of
`gpsd_dist.model.transformer.Transformer` and computes the same function, which a test checks.

Shape letters: B rows, L padded length, N negatives per row, D width (= embedding width), V rows of a table, H heads,
K head width.
"""

import dataclasses
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.transformer import Transformer
from gpsd_dist.schema import NUM_RESERVED_ROWS, Manifest

_INIT_STD = 0.02
_TEMPERATURE = 0.05
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    """int64 unless said; 0 pads on the right."""

    item_BL: torch.Tensor
    category_BL: torch.Tensor
    segment_BL: torch.Tensor  # 0 history, 1 candidate
    length_B: torch.Tensor  # tokens of each row, with the candidate if there is one
    negative_BN: torch.Tensor | None = None  # [B, N] one set per row, or [G, N] shared by B / G rows each
    label_B: torch.Tensor | None = None  # float32


class PaddedLoader:
    """Makes endless shuffled batches from Python lists, padded row by row. The file is parsed once, here."""

    def __init__(
        self,
        data_dir: pathlib.Path,
        manifest: Manifest,
        split: str,
        *,
        batch_rows: int,
        num_negatives: int = 0,
        num_negative_groups: int = 0,
        is_columnar: bool = False,
        seed: int = 0,
    ):
        """`batch_rows` counts requests: with K candidates each, a batch has K times as many padded rows.
        `num_negative_groups` 0: negatives per row. `is_columnar`: pads whole columns instead of row by row.
        """
        self.batch_rows, self.num_negatives, self.num_groups = batch_rows, num_negatives, num_negative_groups
        self.num_items = manifest.table("item").num_rows
        self.max_length = manifest.max_history_length + (split != "pretrain")
        self.random = np.random.default_rng(seed)
        files = [pathlib.Path(data_dir) / file for file in manifest.split(split).files]
        self.table = pa.concat_tables([pq.read_table(file) for file in files]).combine_chunks()
        self.rows = [] if is_columnar else self.table.to_pylist()

    def __iter__(self) -> typing.Iterator[tuple[PaddedBatch, int]]:
        """Yields batches with their number of history tokens, each history counted once whatever its candidates."""
        while True:
            order = self.random.permutation(self.table.num_rows).tolist()
            for start in range(0, len(order), self.batch_rows):
                if not self.rows:
                    yield self._columnar(self.table.take(pa.array(order[start : start + self.batch_rows])))
                    continue
                requests = [self.rows[row] for row in order[start : start + self.batch_rows]]
                examples = [example for request in requests for example in self._examples(request)]
                yield self._collate(examples), sum(len(request["history.item"]) for request in requests)

    def _examples(self, request: dict) -> typing.Iterator[dict]:
        """Makes one row per candidate, with the candidate appended to the history; in pretraining just the history."""
        item, category = request["history.item"], request["history.category"]
        if "candidate.item" not in request:
            yield self._example(item, category, num_history=len(item))
            return
        candidates = (request["candidate.item"], request["candidate.category"], request["label.click"])
        for candidate_item, candidate_category, label in zip(*candidates, strict=True):
            items, categories = [*item, candidate_item], [*category, candidate_category]
            yield self._example(items, categories, num_history=len(item), label=label)

    def _example(self, item: list[int], category: list[int], num_history: int, label: float | None = None) -> dict:
        padding = [0] * (self.max_length - len(item))
        example = {
            "item": item + padding,
            "category": category + padding,
            "segment": [0] * num_history + [1] * (len(item) - num_history) + padding,
            "length": len(item),
            "label": label,
        }
        if self.num_negatives and not self.num_groups:
            example["negative"] = self.random.integers(NUM_RESERVED_ROWS, self.num_items, self.num_negatives)
        return example

    def _collate(self, examples: list[dict]) -> PaddedBatch:
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        return PaddedBatch(
            item_BL=torch.tensor(columns["item"]),
            category_BL=torch.tensor(columns["category"]),
            segment_BL=torch.tensor(columns["segment"]),
            length_B=torch.tensor(columns["length"]),
            negative_BN=torch.from_numpy(np.stack(columns["negative"])) if "negative" in columns else self._shared(),
            label_B=None if columns["label"][0] is None else torch.tensor(columns["label"], dtype=torch.float32),
        )

    def _shared(self) -> torch.Tensor | None:
        """Draws negatives [G, N] of a batch, if it shares any."""
        shape = (self.num_groups, self.num_negatives)
        return torch.from_numpy(self.random.integers(NUM_RESERVED_ROWS, self.num_items, shape)) if all(shape) else None

    def _columnar(self, rows: pa.Table) -> tuple[PaddedBatch, int]:
        """Pads the batch by scatters of whole columns."""
        history = {name: rows[f"history.{name}"].combine_chunks() for name in ("item", "category")}
        length = np.diff(history["item"].offsets.to_numpy())
        num_tokens, per_row, label = int(length.sum()), 1, None
        if "candidate.item" in rows.column_names:
            per_row = len(rows["candidate.item"].combine_chunks().flatten()) // rows.num_rows
            label = torch.from_numpy(rows["label.click"].combine_chunks().flatten().to_numpy().astype(np.float32))
        padded = {}
        for name, column in history.items():
            grid = np.zeros((rows.num_rows, self.max_length), np.int64)
            grid[np.arange(self.max_length) < length[:, None]] = column.flatten().to_numpy()
            grid = np.repeat(grid, per_row, axis=0)
            if label is not None:
                candidate = rows[f"candidate.{name}"].combine_chunks().flatten().to_numpy()
                grid[np.arange(len(grid)), np.repeat(length, per_row)] = candidate
            padded[name] = torch.from_numpy(grid)
        length_B = torch.from_numpy(np.repeat(length, per_row).astype(np.int64))
        segment_BL = torch.zeros_like(padded["item"])
        if label is not None:
            segment_BL[torch.arange(len(length_B)), length_B] = 1
            length_B = length_B + 1
        negative = None
        if self.num_negatives:
            shape = (rows.num_rows, self.num_negatives)
            negative = torch.from_numpy(self.random.integers(NUM_RESERVED_ROWS, self.num_items, shape))
        return PaddedBatch(padded["item"], padded["category"], segment_BL, length_B, negative, label), num_tokens


class PaddedBlock(nn.Module):
    """Applies pre-norm attention and SwiGLU over all L slots of every row."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        hidden = 32 * -(-int(8 * width / 3) // 32)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BLD: torch.Tensor, rotation_LK: torch.Tensor, mask_B1LL: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]"""
        qkv = self.qkv(self.attention_norm(x_BLD)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        query, key = _rotate(query, rotation_LK), _rotate(key, rotation_LK)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1LL)
        x_BLD = x_BLD + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.ffn_norm(x_BLD)).chunk(2, dim=-1)
        return x_BLD + self.down(F.silu(gate) * up)


class PaddedTransformer(nn.Module):
    """Applies a causal tower to padded rows."""

    def __init__(self, layers: int, width: int, heads: int):
        super().__init__()
        self.head_width = width // heads
        self.blocks = nn.ModuleList(PaddedBlock(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x_BLD: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        """Maps [B, L, D] to [B, L, D]; values of padded slots mean nothing."""
        slot_L = torch.arange(x_BLD.shape[1])
        is_key_B1L = (slot_L < length_B[:, None])[:, None]
        mask_B1LL = (is_key_B1L & (slot_L[:, None] >= slot_L))[:, None]
        exponent = torch.arange(0, self.head_width, 2).float() / self.head_width
        angle = slot_L[:, None].float() * 1e4**-exponent
        rotation = torch.polar(torch.ones_like(angle), angle)
        for block in self.blocks:
            x_BLD = block(x_BLD, rotation, mask_B1LL)
        return self.norm(x_BLD)


class PaddedModel(nn.Module):
    """Joins item, category and segment embeddings, a tower (padded, or the product's packed one), rank head."""

    def __init__(self, manifest: Manifest, layers: int, width: int, heads: int, is_packed: bool = False):
        super().__init__()
        self.item = nn.Embedding(manifest.table("item").num_rows, width, padding_idx=0)
        self.category = nn.Embedding(manifest.table("category").num_rows, width, padding_idx=0)
        self.segment = nn.Embedding(2, width)
        config = ModelConfig(layers=layers, width=width, heads=heads)
        self.tower = Transformer(config, 1) if is_packed else PaddedTransformer(layers, width, heads)
        self.head = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_STD)

    def loss(self, batch: PaddedBatch) -> torch.Tensor:
        """Computes the mean loss of the stage that the batch was made for."""
        x_BLD = self.item(batch.item_BL) + self.category(batch.category_BL) + self.segment(batch.segment_BL)
        packed = isinstance(self.tower, Transformer)
        hidden_BLD = self._packed(x_BLD, batch.length_B) if packed else self.tower(x_BLD, batch.length_B)
        if batch.label_B is None:
            return self._next_item_loss(hidden_BLD, batch) + self._next_category_loss(hidden_BLD, batch)
        hidden_BD = hidden_BLD[torch.arange(len(hidden_BLD)), batch.length_B - 1]
        return F.binary_cross_entropy_with_logits(self.head(hidden_BD).squeeze(-1), batch.label_B)

    def _packed(self, x_BLD: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        """Maps [B, L, D] to [B, L, D] by a tower of tokens without padding; padded slots are 0."""
        length, order = length_B.sort()
        is_token = torch.arange(x_BLD.shape[1]) < length[:, None]
        packing = Packing.from_lengths(length.numpy(), np.zeros(len(length), np.int64))
        hidden_BLD = torch.zeros_like(x_BLD)
        hidden_BLD[is_token] = self.tower(x_BLD[order][is_token], packing)
        return hidden_BLD[order.argsort()]

    def _next_item_loss(self, hidden_BLD: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        """Computes the cosine softmax of the target against the row's own (or its group's) N negatives, over every
        slot.
        """
        num_rows, num_sets = len(batch.item_BL), len(batch.negative_BN)
        if num_sets < num_rows:
            parts = [
                self._summed_item_loss(hidden_BLD[rows], batch.item_BL[rows], batch.negative_BN[group])
                for group, rows in enumerate(torch.arange(num_rows).tensor_split(num_sets))
            ]
            return torch.stack([loss for loss, _ in parts]).sum() / sum(count for _, count in parts)
        target_BL = batch.item_BL[:, 1:]
        query_BLD = F.normalize(hidden_BLD[:, :-1], dim=-1)
        positive_BL1 = (query_BLD * F.normalize(self.item(target_BL), dim=-1)).sum(-1, keepdim=True)
        negative_BND = F.normalize(self.item(batch.negative_BN), dim=-1)
        negative_BLN = torch.bmm(query_BLD, negative_BND.transpose(1, 2))
        is_hit_BLN = target_BL[:, :, None] == batch.negative_BN[:, None, :]
        negative_BLN = negative_BLN.masked_fill(is_hit_BLN, -1e4)
        logits = torch.cat((positive_BL1, negative_BLN), -1) / _TEMPERATURE
        correct_BL = torch.where(target_BL >= NUM_RESERVED_ROWS, 0, _IGNORED)
        return F.cross_entropy(logits.flatten(0, 1), correct_BL.flatten(), ignore_index=_IGNORED)

    def _summed_item_loss(self, hidden_BLD, item_BL, negative_N) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes (sum, count) of the loss of rows that share a set of negatives: one matrix product for all."""
        target_BL = item_BL[:, 1:]
        query_BLD = F.normalize(hidden_BLD[:, :-1], dim=-1)
        positive_BL1 = (query_BLD * F.normalize(self.item(target_BL), dim=-1)).sum(-1, keepdim=True)
        negative_BLN = query_BLD @ F.normalize(self.item(negative_N), dim=-1).t()
        negative_BLN = negative_BLN.masked_fill(target_BL[:, :, None] == negative_N, -1e4)
        logits = torch.cat((positive_BL1, negative_BLN), -1) / _TEMPERATURE
        correct_BL = torch.where(target_BL >= NUM_RESERVED_ROWS, 0, _IGNORED)
        loss = F.cross_entropy(logits.flatten(0, 1), correct_BL.flatten(), ignore_index=_IGNORED, reduction="sum")
        return loss, (correct_BL == 0).sum()

    def _next_category_loss(self, hidden_BLD: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        """Computes the cosine softmax over all categories."""
        query_BLD = F.normalize(hidden_BLD[:, :-1], dim=-1)
        logits_BLV = query_BLD @ F.normalize(self.category.weight, dim=-1).t() / _TEMPERATURE
        is_target_BL = batch.item_BL[:, 1:] >= NUM_RESERVED_ROWS
        correct_BL = torch.where(is_target_BL, batch.category_BL[:, 1:], _IGNORED)
        return F.cross_entropy(logits_BLV.flatten(0, 1), correct_BL.flatten(), ignore_index=_IGNORED)


class PaddedBaseline:
    """Holds loader, model and optimizer of the scheme; `run_steps` trains."""

    def __init__(
        self,
        loader: PaddedLoader,
        manifest: Manifest,
        *,
        layers: int,
        width: int,
        heads: int,
        is_packed: bool = False,
        seed: int = 0,
    ):
        torch.manual_seed(seed)
        self.model = PaddedModel(manifest, layers, width, heads, is_packed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
        self.batches = iter(loader)
        self.last_loss = float("nan")

    def run_steps(self, count: int) -> int:
        """Trains `count` steps; returns the history tokens of their requests, each request counted once."""
        num_tokens = 0
        for _ in range(count):
            batch, batch_tokens = next(self.batches)
            self.optimizer.zero_grad()
            loss = self.model.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.last_loss = loss.item()
            num_tokens += batch_tokens
        return num_tokens


def _rotate(x_BHLK: torch.Tensor, rotation_LK: torch.Tensor) -> torch.Tensor:
    """Rotates interleaved pairs of channels by position."""
    pairs = torch.view_as_complex(x_BHLK.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation_LK).flatten(-2).to(x_BHLK.dtype)

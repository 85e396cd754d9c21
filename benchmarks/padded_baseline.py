"""The scheme of the official GPSD code, written anew for comparison: what one would write without packing or sharing.

Rows are padded to the longest allowed history, one row per (history, candidate); every sequence has its own negatives;
the item table is an ordinary `nn.Embedding` under dense AdamW; a Python loader pads row by row. Settings of
arXiv:2506.03699 (section 3.2 and the authors' configuration). The tower has the parameter names of
`gpsd_dist.model.transformer.Transformer` and computes the same function, which a test checks.

Shape letters: B rows, L padded length, N negatives per row, D width (= embedding width), V rows of a table, H heads,
K head width.
"""

import dataclasses
import pathlib
import typing

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn

from gpsd_dist.schema import NUM_RESERVED_ROWS, Manifest

_INIT_STD = 0.02
_TEMPERATURE = 0.05
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    """int64 unless said; 0 pads on the right."""

    item_BL: torch.Tensor
    category_BL: torch.Tensor
    segment_BL: torch.Tensor
    """0 history, 1 candidate"""
    length_B: torch.Tensor
    """Tokens of each row, with the candidate if there is one."""
    negative_BN: torch.Tensor | None = None
    label_B: torch.Tensor | None = None
    """float32"""


class PaddedLoader:
    """Endless shuffled batches from Python lists, padded row by row. The file is parsed once, here."""

    def __init__(
        self,
        data_dir: pathlib.Path,
        manifest: Manifest,
        split: str,
        *,
        batch_rows: int,
        num_negatives: int = 0,
        seed: int = 0,
    ):
        """`batch_rows` counts requests: with K candidates each, a batch has K times as many padded rows."""
        self.batch_rows, self.num_negatives = batch_rows, num_negatives
        self.num_items = manifest.table("item").num_rows
        self.max_length = manifest.max_history_length + (split != "pretrain")
        self.random = np.random.default_rng(seed)
        files = [pathlib.Path(data_dir) / file for file in manifest.split(split).files]
        self.rows = [row for file in files for row in pq.read_table(file).to_pylist()]

    def __iter__(self) -> typing.Iterator[tuple[PaddedBatch, int]]:
        """Batches with their number of history tokens, each history counted once whatever its candidates."""
        while True:
            order = self.random.permutation(len(self.rows)).tolist()
            for start in range(0, len(order), self.batch_rows):
                requests = [self.rows[row] for row in order[start : start + self.batch_rows]]
                examples = [example for request in requests for example in self._examples(request)]
                yield self._collate(examples), sum(len(request["history.item"]) for request in requests)

    def _examples(self, request: dict) -> typing.Iterator[dict]:
        """One row per candidate, with the candidate appended to the history; in pretraining just the history."""
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
        if self.num_negatives:
            example["negative"] = self.random.integers(NUM_RESERVED_ROWS, self.num_items, self.num_negatives)
        return example

    def _collate(self, examples: list[dict]) -> PaddedBatch:
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        return PaddedBatch(
            item_BL=torch.tensor(columns["item"]),
            category_BL=torch.tensor(columns["category"]),
            segment_BL=torch.tensor(columns["segment"]),
            length_B=torch.tensor(columns["length"]),
            negative_BN=torch.from_numpy(np.stack(columns["negative"])) if self.num_negatives else None,
            label_B=None if columns["label"][0] is None else torch.tensor(columns["label"], dtype=torch.float32),
        )


class PaddedBlock(nn.Module):
    """Pre-norm attention and SwiGLU over all L slots of every row."""

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
    """Causal tower over padded rows."""

    def __init__(self, layers: int, width: int, heads: int):
        super().__init__()
        self.head_width = width // heads
        self.blocks = nn.ModuleList(PaddedBlock(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x_BLD: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]; what stands in padded slots means nothing."""
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
    """Item + category + segment embeddings, tower, rank head."""

    def __init__(self, manifest: Manifest, layers: int, width: int, heads: int):
        super().__init__()
        self.item = nn.Embedding(manifest.table("item").num_rows, width, padding_idx=0)
        self.category = nn.Embedding(manifest.table("category").num_rows, width, padding_idx=0)
        self.segment = nn.Embedding(2, width)
        self.tower = PaddedTransformer(layers, width, heads)
        self.head = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_STD)

    def loss(self, batch: PaddedBatch) -> torch.Tensor:
        """Mean loss of the stage that the batch was made for."""
        x_BLD = self.item(batch.item_BL) + self.category(batch.category_BL) + self.segment(batch.segment_BL)
        hidden_BLD = self.tower(x_BLD, batch.length_B)
        if batch.label_B is None:
            return self._next_item_loss(hidden_BLD, batch) + self._next_category_loss(hidden_BLD, batch)
        hidden_BD = hidden_BLD[torch.arange(len(hidden_BLD)), batch.length_B - 1]
        return F.binary_cross_entropy_with_logits(self.head(hidden_BD).squeeze(-1), batch.label_B)

    def _next_item_loss(self, hidden_BLD: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        """Cosine softmax of the target against the row's own N negatives, over every slot."""
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

    def _next_category_loss(self, hidden_BLD: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        """The same cosine softmax over all categories."""
        query_BLD = F.normalize(hidden_BLD[:, :-1], dim=-1)
        logits_BLV = query_BLD @ F.normalize(self.category.weight, dim=-1).t() / _TEMPERATURE
        is_target_BL = batch.item_BL[:, 1:] >= NUM_RESERVED_ROWS
        correct_BL = torch.where(is_target_BL, batch.category_BL[:, 1:], _IGNORED)
        return F.cross_entropy(logits_BLV.flatten(0, 1), correct_BL.flatten(), ignore_index=_IGNORED)


class PaddedBaseline:
    """Loader, model and optimizer of the scheme; `run_steps` trains."""

    def __init__(self, loader: PaddedLoader, manifest: Manifest, *, layers: int, width: int, heads: int, seed: int = 0):
        torch.manual_seed(seed)
        self.model = PaddedModel(manifest, layers, width, heads)
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
    """Rotary positions on interleaved pairs of channels."""
    pairs = torch.view_as_complex(x_BHLK.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation_LK).flatten(-2).to(x_BHLK.dtype)

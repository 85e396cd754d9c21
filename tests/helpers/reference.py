"""Small padded re-implementations in plain torch, written from the paper and its official settings: what the packed
model is compared with. One request at a time or right-padded batches; nothing here knows about packing.
"""

import math

import torch


def rms_norm(x, weight, eps=1e-5):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotary(x_BLHK, position_BL, theta=1e4):
    """Turns channel pair (2i, 2i + 1) by position * theta^(-2i / K)."""
    width = x_BLHK.shape[-1]
    out = torch.empty_like(x_BLHK)
    for i in range(width // 2):
        angle = position_BL.to(x_BLHK.dtype) * theta ** (-2 * i / width)
        cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
        even, odd = x_BLHK[..., 2 * i], x_BLHK[..., 2 * i + 1]
        out[..., 2 * i] = even * cos - odd * sin
        out[..., 2 * i + 1] = even * sin + odd * cos
    return out


def causal_attention(query_BLHK, key_BLHK, value_BLHK, length_B):
    """Explicit mask: a token sees itself and earlier real tokens of its row."""
    slots = torch.arange(query_BLHK.shape[1])
    score_BHLM = torch.einsum("blhk,bmhk->bhlm", query_BLHK, key_BLHK) / math.sqrt(query_BLHK.shape[-1])
    is_seen = (slots[None, :] <= slots[:, None])[None] & (
        (slots < length_B[:, None])[:, None] | torch.eye(len(slots), dtype=torch.bool)
    )
    score_BHLM = score_BHLM.masked_fill(~is_seen[:, None], -1e30)
    return torch.einsum("bhlm,bmhk->blhk", score_BHLM.softmax(-1), value_BLHK).flatten(2)


def transformer(x_BLD, length_B, weights, *, layers, heads):
    """Hidden states [B, L, D] of right-padded rows; `weights` is the state dict of the packed tower."""
    batch, slots, _ = x_BLD.shape
    position = torch.arange(slots).expand(batch, slots)
    for layer in range(layers):
        w = {
            key.removeprefix(f"blocks.{layer}."): value
            for key, value in weights.items()
            if key.startswith(f"blocks.{layer}.")
        }
        normed = rms_norm(x_BLD, w["attention_norm.weight"])
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in (normed @ w["qkv.weight"].T).chunk(3, -1))
        attended = causal_attention(rotary(query, position), rotary(key, position), value, length_B)
        x_BLD = x_BLD + attended @ w["attention_out.weight"].T
        gate, up = (rms_norm(x_BLD, w["ffn_norm.weight"]) @ w["gate_up.weight"].T).chunk(2, -1)
        x_BLD = x_BLD + (gate * torch.sigmoid(gate) * up) @ w["down.weight"].T
    return rms_norm(x_BLD, weights["norm.weight"])


def pad(rows):
    """List of [l, D] -> ([B, L, D], lengths), zeros to the right; L is at least 1."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = max(int(lengths.max()), 1)
    return torch.stack([torch.cat((row, row.new_zeros(longest - len(row), row.shape[1]))) for row in rows]), lengths


def histories_and_candidates(history_rows, candidate_rows, weights, *, layers, heads):
    """K separate passes: every candidate is appended as the last token of its own copy of the history.

    Lists of [l, D] and [k, D] per request -> hidden states of all histories, then of all candidates, [T + C, D].
    """
    outputs = []
    padded, lengths = pad(history_rows)
    hidden = transformer(padded, lengths, weights, layers=layers, heads=heads)
    outputs += [row[:length] for row, length in zip(hidden, lengths)]
    for history, candidates in zip(history_rows, candidate_rows):
        for candidate in candidates:
            row = torch.cat((history, candidate[None]))[None]
            outputs.append(transformer(row, torch.tensor([row.shape[1]]), weights, layers=layers, heads=heads)[0, -1:])
    return torch.cat(outputs)


def sampled_softmax(
    hidden_ME, rows_UE, target_row_M, target_item_M, negative_row_GN, negative_item_GN, group_M, temperature
):
    """Sum over positions of -log softmax([target, negatives of its group])[0] on cosine / temperature; a negative that
    names the target item is left out of the sum."""
    total = hidden_ME.new_zeros(())
    for m in range(len(hidden_ME)):
        query = hidden_ME[m] / hidden_ME[m].norm()
        logits = []
        for row, item in zip(negative_row_GN[group_M[m]], negative_item_GN[group_M[m]]):
            if item != target_item_M[m]:
                logits.append(query @ (rows_UE[row] / rows_UE[row].norm()) / temperature)
        positive = query @ (rows_UE[target_row_M[m]] / rows_UE[target_row_M[m]].norm()) / temperature
        total = total + torch.stack([positive, *logits]).exp().sum().log() - positive
    return total


def fill_(module):
    """Deterministic, non-constant, non-symmetric weights of moderate size: all-ones would hide a transpose."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = torch.sin(1.7 * values + index) + 0.5 * torch.cos(0.37 * values)
            scale = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_((wave * scale * 0.7 + (1.0 if parameter.dim() < 2 else 0.0)).view_as(parameter))
    return module

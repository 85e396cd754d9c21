"""SASRec and HSTU again, in loops over tokens, pairs and heads of one sequence, to compare the packed towers with.

`weights` is the state dict of the packed tower. Nothing here knows about packing, buckets or candidates.
"""

import math

import torch


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


def of_layer(weights, layer):
    prefix = f"blocks.{layer}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def with_positions(x_LD, weights):
    return torch.stack(
        [x * math.sqrt(x_LD.shape[1]) + weights["positions.table.weight"][i] for i, x in enumerate(x_LD)]
    )


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def sasrec(x_LD, weights, *, layers, heads, times=None):
    x = with_positions(x_LD, weights)
    for layer in range(layers):
        w = of_layer(weights, layer)
        normed = layer_norm(x, 1e-8)
        query, (key, value) = linear(normed, w, "query"), linear(x, w, "key_value").chunk(2, -1)
        parts = [part.unflatten(-1, (heads, -1)) for part in (query, key, value)]
        rows = []
        for i in range(len(x)):
            out = []
            for head in range(heads):
                q, k, v = (part[:, head] for part in parts)
                score = torch.stack([q[i] @ k[j] / math.sqrt(q.shape[1]) for j in range(i + 1)])
                out.append(sum(weight * v[j] for j, weight in enumerate(score.softmax(0))))
            rows.append(torch.cat(out))
        h = layer_norm(normed + linear(torch.stack(rows), w, "attention_out"), 1e-8)
        x = h + linear(linear(h, w, "up").clamp(min=0), w, "down")
    return x


def time_bucket(query_s, key_s):
    """The last bucket where a time is not known."""
    if query_s < 0 or key_s < 0:
        return 128
    return min(max(math.floor(math.log(max(abs(query_s - key_s), 1)) / 0.301), 0), 128)


def hstu(x_LD, weights, *, layers, heads, times):
    """`times`: seconds of every event, and of what comes after the last."""
    x = with_positions(x_LD, weights)
    for layer in range(layers):
        w = of_layer(weights, layer)
        n = (len(w["position_bias"]) + 1) // 2
        z = layer_norm(x, 1e-6) @ w["uvqk.weight"].T
        gate, value, query, key = (z * torch.sigmoid(z)).chunk(4, -1)
        rows = []
        for i in range(len(x)):
            out = []
            for head in range(heads):
                q, k, v = (part.unflatten(-1, (heads, -1))[:, head] for part in (query, key, value))
                total = torch.zeros_like(v[0])
                for j in range(i + 1):
                    score = q[i] @ k[j] + w["position_bias"][n - 1 - (i - j)]
                    if "time_bias" in w:
                        score = score + w["time_bias"][time_bucket(times[i + 1], times[j])]
                    total = total + score * torch.sigmoid(score) / n * v[j]
                out.append(total)
            rows.append(torch.cat(out))
        x = x + linear(gate * layer_norm(torch.stack(rows), 1e-6), w, "out")
    return x


def histories_and_candidates(run, history_rows, candidate_rows, weights, *, times, request_times, **sizes):
    """K separate passes: every candidate is the last token of its own copy of the history, at the request's time.

    `run` is `sasrec` or `hstu`. Lists per request -> states of all histories, then of all candidates, [T + C, D].
    """
    histories, candidates = [], []
    for rows, own, events, request in zip(history_rows, candidate_rows, times, request_times):
        if len(rows):
            histories.append(run(rows, weights, times=[*events, request], **sizes))
        for candidate in own:
            sequence = torch.cat((rows, candidate[None]))
            candidates.append(run(sequence, weights, times=[*events, request, request], **sizes)[-1:])
    return torch.cat([*histories, *candidates])

"""The click models of `gpsd_dist.model`, one candidate and one token at a time, written from their papers and the
settings of the official variants. Nothing here knows about packing, sharing or batches.

Each function: history [l, F, D] (oldest first), candidate [F, D], the weights of the packed tower by name -> state.
"""

import torch


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def layer_norm(x, w, name, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention_weights(target, tokens, w, name):
    """Softmax over the tokens of MLP([target, token, target - token, target * token]), with DIN's activation."""
    scores = []
    for token in tokens:
        x = torch.cat((target, token, target - token, target * token))
        layers = len([key for key in w if key.startswith(f"{name}.linears.") and key.endswith("weight")])
        for layer in range(layers):
            x = linear(x, w, f"{name}.linears.{layer}")
            if layer < layers - 1:
                alpha, slope, threshold = (w[f"{name}.dices.{layer}.{key}"] for key in ("alpha", "slope", "threshold"))
                p = 1 / (1 + torch.exp(-slope * (x - threshold)))
                x = p * x + (1 - p) * alpha * x
        scores.append(x[0])
    powers = torch.stack(scores).exp()
    return powers / powers.sum()


def weighted_sum(weights, tokens):
    return sum(weight * token for weight, token in zip(weights, tokens))


def deepfm(history, candidate, w):
    mean = history.mean(0) if len(history) else torch.zeros_like(candidate)
    fields = [*candidate, *mean]
    products = sum(fields[i] @ fields[j] for i in range(len(fields)) for j in range(i))
    return torch.cat((products[None], *fields))


def din(history, candidate, w):
    tokens, target = history.flatten(1), candidate.flatten()
    pooled = torch.zeros_like(target)
    if len(tokens):
        pooled = weighted_sum(attention_weights(target, tokens, w, "attention"), tokens)
    return torch.cat((pooled, target))


def gru_gates(x, state, input_weight, input_bias, state_weight, state_bias):
    """Update gate and new state of a GRU: torch's layout (reset, update, new)."""
    reset_x, update_x, new_x = (input_weight @ x + input_bias).chunk(3)
    reset_h, update_h, new_h = (state_weight @ state + state_bias).chunk(3)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return 1 - torch.sigmoid(update_x + update_h), new  # torch's z keeps the old state, the paper's u takes the new one


def gru_states(tokens, w):
    """State after every token."""
    names = ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0")
    states, state = [], torch.zeros_like(tokens[0]) if len(tokens) else None
    for token in tokens:
        update, new = gru_gates(token, state, *(w[f"extractor.{name}"] for name in names))
        state = (1 - update) * state + update * new
        states.append(state)
    return states


def dien(history, candidate, w):
    tokens, target = history.flatten(1), candidate.flatten()
    states, final = gru_states(tokens, w), torch.zeros_like(target)
    if len(tokens):
        names = ("of_input.weight", "of_input.bias", "of_state.weight", "of_state.bias")
        for state, attention in zip(states, attention_weights(target, states, w, "attention")):
            keep, new = gru_gates(state, final, *(w[f"evolution.{name}"] for name in names))
            update = attention * (1 - keep)  # the cell has the paper's convention
            final = (1 - update) * final + update * new
    total = tokens.sum(0)
    return torch.cat((final, total, total * target, target))


def causal_heads(tokens, w, name, heads):
    """Outputs of the heads at every token: list over tokens of lists over heads."""
    projected = [linear(token, w, name).chunk(3) for token in tokens]
    outputs = []
    for i in range(len(tokens)):
        per_head = []
        for head in range(heads):
            part = [[vector.chunk(heads)[head] for vector in triple] for triple in projected[: i + 1]]
            query = part[i][0]
            powers = torch.stack([query @ key / len(query) ** 0.5 for _, key, _ in part]).exp()
            per_head.append(weighted_sum(powers / powers.sum(), [value for _, _, value in part]))
        outputs.append(per_head)
    return outputs


def refinement(token, attended, w, name):
    x = token + linear(attended, w, f"{name}.project")
    hidden = torch.relu(linear(x, w, f"{name}.ffn.0"))
    return x + linear(hidden, w, f"{name}.ffn.2")


def dmin_refined(tokens, w, heads):
    attended = causal_heads(tokens, w, "refiner_qkv", heads)
    return [refinement(token, torch.cat(parts), w, "refiner") for token, parts in zip(tokens, attended)]


def dmin(history, candidate, w, heads=2):
    tokens, target = history.flatten(1), candidate.flatten()
    interests = [torch.zeros_like(target)] * heads
    if len(tokens):
        refined = dmin_refined(tokens, w, heads)
        attended = causal_heads(refined, w, "extractor_qkv", heads)
        for head in range(heads):
            values = [refinement(token, parts[head], w, f"interests.{head}") for token, parts in zip(refined, attended)]
            interests[head] = weighted_sum(attention_weights(target, values, w, f"attentions.{head}"), values)
    total = tokens.sum(0)
    return torch.cat((*interests, total, total * target, target))


def wukong(history, candidate, w, max_positions=15):
    empty = [torch.zeros_like(candidate)] * (max_positions - len(history))
    x = torch.cat([candidate, *reversed(history), *empty])
    for layer in range(len([key for key in w if key.endswith("mixing")])):
        name = f"layers.{layer}"
        y, compress, residual = w[f"{name}.mixing"].split([24, 16, w[f"{name}.mixing"].shape[1] - 40], dim=1)
        hidden = layer_norm(((x @ x.T) @ y).flatten(), w, f"{name}.fm_norm")
        crossed = linear(torch.relu(linear(hidden, w, f"{name}.fm.0")), w, f"{name}.fm.2").view(16, -1)
        carried = residual.T @ x if residual.shape[1] else x
        x = layer_norm(torch.cat((crossed, compress.T @ x)) + carried, w, f"{name}.norm")
    return x.flatten()


STATES = {"deepfm": deepfm, "din": din, "dien": dien, "dmin": dmin, "wukong": wukong}

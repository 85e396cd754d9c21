"""Computes a trained Transformer, SASRec or HSTU in two parts, so that a history is encoded once, and then kept.

`Encode` turns history tokens into keys and values of every layer, after those of an earlier part of the same history;
`Score` lets candidates attend to them. The layers are in `layer_forms`. Sizes are free (requests, tokens, candidates),
and all operations have an ONNX form.

Shape letters: B requests, P tokens encoded before, N new tokens, W = P + N, K candidates, D width, H heads,
A channels of a head, L layers.
"""

import typing

import torch
from torch import nn

from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.model.hstu import HSTU
from gpsd_dist.model.sasrec import SASRec
from gpsd_dist.model.transformer import ROPE_THETA, Transformer
from gpsd_dist.serving.layer_forms import HSTULayer, Layer, SASRecLayer, TransformerLayer, Turn

LAYERS: dict[type, typing.Callable[..., typing.Any]] = {
    Transformer: TransformerLayer,
    SASRec: SASRecLayer,
    HSTU: HSTULayer,
}
"""Towers that can be computed in two parts. The others mix a candidate into its history before they sum it up."""


def layers_of(tower: typing.Any) -> list[Layer]:
    """Rearranges the layers of a tower. ValueError if it has no two parts."""
    if type(tower) not in LAYERS:
        known = ", ".join(kind.__name__ for kind in LAYERS)
        raise ValueError(f"only {known} have keys and values of a history to keep; this is {type(tower).__name__}")
    return [LAYERS[type(tower)](block) for block in tower.blocks]


def is_timed(tower: typing.Any) -> bool:
    """Says whether attention depends on times: `Encode` and `Score` take time buckets then."""
    return isinstance(tower, HSTU) and tower.time_bias


class _Form(nn.Module):
    """Holds what both parts share."""

    def __init__(self, tower: typing.Any):
        super().__init__()
        layers = layers_of(tower)
        self.layers = nn.ModuleList(typing.cast("list[nn.Module]", layers))
        self.positions = None if isinstance(tower, Transformer) else tower.positions
        exponent = torch.arange(0, layers[0].head_width, 2, dtype=torch.float32) / layers[0].head_width
        self.frequency = nn.Parameter(ROPE_THETA**-exponent, requires_grad=False)

    def placed(self, x_BND: torch.Tensor, position_BN: torch.Tensor) -> tuple[torch.Tensor, Turn]:
        """Adds learned positions to tokens, or gives cosine and sine of rotary ones: [B, 1, N, A / 2] each."""
        if self.positions is not None:
            return self.positions(x_BND, position_BN), None
        angle = position_BN[:, None, :, None].to(torch.float32) * self.frequency
        return x_BND, (angle.cos(), angle.sin())


class Encode(_Form):
    """Encodes the tokens of histories that follow `P` encoded ones; all requests of a call have the same P."""

    def forward(
        self,
        x_BND: torch.Tensor,
        keys_LBHPA: torch.Tensor,
        values_LBHPA: torch.Tensor,
        bucket_BNW: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of all W tokens: [L, B, H, W, A] each. Padding at the end is for `Score` to hide."""
        num_old, num_new = keys_LBHPA.shape[3], x_BND.shape[1]
        position_N = torch.arange(num_new, device=x_BND.device) + num_old
        distance_NW = torch.arange(num_old + num_new, device=x_BND.device)[None] - position_N[:, None]
        x_BND, turn = self.placed(x_BND, position_N[None])
        keys, values = [], []
        for index, layer in enumerate(typing.cast("list[Layer]", self.layers)):
            normed_BND = layer.normed(x_BND)
            key, value = layer.keys_values(x_BND, normed_BND, turn)
            keys.append(torch.cat([keys_LBHPA[index], key], 2))
            values.append(torch.cat([values_LBHPA[index], value], 2))
            if index + 1 < len(self.layers):  # behind the last layer nothing of a history is read
                read = layer.query(normed_BND, turn), keys[-1], values[-1]
                x_BND = layer.after(x_BND, normed_BND, layer.of_history(read, distance_NW, bucket_BNW))
        return torch.stack(keys), torch.stack(values)


class Score(_Form):
    """Scores candidates by the keys and values of their histories."""

    def __init__(self, model: RankingModel, tasks: tuple[str, ...]):
        tower = model.backbone.tower
        super().__init__(tower)
        gain = tower.norm.weight.detach() if isinstance(tower, Transformer) else None
        self.gain = None if gain is None else nn.Parameter(gain, requires_grad=False)
        self.heads, self.tasks = model.heads, tasks

    def forward(
        self,
        x_BKD: torch.Tensor,
        context_BKC: torch.Tensor,
        length_B: torch.Tensor,
        keys_LBHWA: torch.Tensor,
        values_LBHWA: torch.Tensor,
        bucket_BV: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns logits [tasks, B, K]. `length_B`: tokens of each history; those behind are padding."""
        # Every candidate stands right behind the history.
        distance_BW = torch.arange(keys_LBHWA.shape[3], device=x_BKD.device)[None] - length_B[:, None]
        x_BKD, turn = self.placed(x_BKD, length_B[:, None])
        for index, layer in enumerate(typing.cast("list[Layer]", self.layers)):
            normed_BKD = layer.normed(x_BKD)
            own = layer.keys_values(x_BKD, normed_BKD, turn)
            read = layer.query(normed_BKD, turn), keys_LBHWA[index], values_LBHWA[index]
            x_BKD = layer.after(x_BKD, normed_BKD, layer.of_candidates(read, own, distance_BW, bucket_BV))
        if self.gain is not None:
            x_BKD = typing.cast("Layer", self.layers[0]).normed(x_BKD) * self.gain
        logits = self.heads(torch.cat([x_BKD, context_BKC], -1))
        return torch.stack([logits[task] for task in self.tasks])

"""Maps a tower's states to outputs: logits by one ranking MLP per task, item vectors for next-item prediction.

Shape letter: C candidates.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from gpsd_dist.model.transformer import init_linear
from gpsd_dist.parameter_names import module_key

_SHORTEST = 1e-6  # as in the code of both GPSD and HSTU; below it, the gradient of a direction would explode


def unit(x: torch.Tensor) -> torch.Tensor:
    """Divides vectors [..., E] by their length, or by 1e-6 if they are shorter: float32 [..., E]."""
    return F.normalize(x.float(), dim=-1, eps=_SHORTEST)


class RankingHeads(nn.Module):
    """Has one MLP per task: state + context -> hidden widths -> 1, with ReLU.

    The first `direct_width` columns of the state skip the hidden layers and enter the last one, which then follows the
    last hidden layer without a ReLU in between (DeepFM's official form). With `has_offset` the last column, beyond
    `in_width`, is added to the logit of the first task, and no layer sees it.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        in_width: int,
        hidden_widths: tuple[int, ...],
        init_std: float,
        direct_width: int = 0,
        has_offset: bool = False,
    ):
        super().__init__()
        self.tasks, self.direct_width, self.has_offset = tasks, direct_width, has_offset
        self.mlps = nn.ModuleDict({module_key(task): _mlp(in_width, hidden_widths, direct_width) for task in tasks})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, init_std)

    def forward(self, x_C: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps [..., in_width (+ 1)] to task -> logits float32 [...]; of a conditional task: the conditional ones."""
        x_C, offset_C = (x_C[..., :-1], x_C[..., -1]) if self.has_offset else (x_C, None)
        logits = {task: self._logit(self.mlps[module_key(task)], x_C).squeeze(-1).float() for task in self.tasks}
        if offset_C is not None:
            logits[self.tasks[0]] = logits[self.tasks[0]] + offset_C
        return logits

    def _logit(self, mlp: nn.Sequential, x_C: torch.Tensor) -> torch.Tensor:
        if not self.direct_width:
            return mlp(x_C)
        direct_C, x_C = x_C.tensor_split([self.direct_width], dim=1)
        return mlp[-1](torch.cat((mlp[:-1](x_C), direct_C), dim=1))


def _mlp(in_width: int, hidden_widths: tuple[int, ...], direct_width: int) -> nn.Sequential:
    widths = (in_width - direct_width, *hidden_widths)
    layers: list[nn.Module] = []
    for left, right in itertools.pairwise(widths):
        layers += [nn.Linear(left, right), nn.ReLU()]
    if direct_width:
        layers[-1] = nn.Identity()
    return nn.Sequential(*layers, nn.Linear(widths[-1] + direct_width, 1))


class Projection(nn.Module):
    """Projects vectors [..., in] -> [..., out] by a linear layer with an RMSNorm; identity if the widths are equal."""

    def __init__(self, in_width: int, out_width: int, init_std: float, *, norm_first: bool, eps: float):
        """Puts the norm on the side of the embeddings: first on the way into the tower, last on the way out."""
        super().__init__()
        self.layers = nn.Sequential()
        if in_width != out_width:
            linear = nn.Linear(in_width, out_width, bias=False)
            init_linear(linear, init_std)
            norm = nn.RMSNorm(in_width if norm_first else out_width, eps=eps)
            self.layers = nn.Sequential(*((norm, linear) if norm_first else (linear, norm)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., in] -> [..., out]."""
        return self.layers(x)

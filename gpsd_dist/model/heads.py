"""Maps a tower's states to outputs: logits by one ranking MLP per task, item vectors for next-item prediction.

Shape letters: C candidates, T history tokens, D width, E embedding width.
"""

import itertools

import torch
from torch import nn

from gpsd_dist.model.transformer import init_linear
from gpsd_dist.parameter_names import module_key


class RankingHeads(nn.Module):
    """Has one MLP per task: state + context -> hidden widths -> 1, with ReLU.

    The first `direct_width` columns of the state skip the hidden layers and enter the last one.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        in_width: int,
        hidden_widths: tuple[int, ...],
        init_std: float,
        direct_width: int = 0,
    ):
        super().__init__()
        self.tasks, self.direct_width = tasks, direct_width
        self.mlps = nn.ModuleDict({module_key(task): _mlp(in_width, hidden_widths, direct_width) for task in tasks})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, init_std)

    def forward(self, x_C: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps [C, in_width] to task -> logits float32 [C]; for a conditional task, of the conditional probability."""
        return {task: self._logit(self.mlps[module_key(task)], x_C).squeeze(-1).float() for task in self.tasks}

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
    return nn.Sequential(*layers, nn.Linear(widths[-1] + direct_width, 1))


class ProjectionOut(nn.Module):
    """Projects hidden states [T, D] to item space [T, E]: linear + RMSNorm if the widths differ, else identity."""

    def __init__(self, width: int, embedding_dim: int, init_std: float):
        super().__init__()
        self.layers = nn.Sequential()
        if width != embedding_dim:
            projection = nn.Linear(width, embedding_dim, bias=False)
            self.layers = nn.Sequential(projection, nn.RMSNorm(embedding_dim, eps=1e-5))
            init_linear(self.layers[0], init_std)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Maps [T, D] -> [T, E]."""
        return self.layers(hidden_TD)


class ProjectionIn(nn.Module):
    """Projects token vectors [..., E] -> [..., D]: RMSNorm + linear if the widths differ, else identity."""

    def __init__(self, embedding_dim: int, width: int, init_std: float):
        super().__init__()
        self.layers = nn.Sequential()
        if width != embedding_dim:
            projection = nn.Linear(embedding_dim, width, bias=False)
            self.layers = nn.Sequential(nn.RMSNorm(embedding_dim, eps=1e-5), projection)
            init_linear(self.layers[1], init_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., E] -> [..., D]."""
        return self.layers(x)

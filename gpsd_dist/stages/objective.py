"""What a stage minimises: named losses, their weights, and how many things each counts in a batch.

The objective is sum over losses of weight * (sum over all ranks / count over all ranks).
"""

import dataclasses
import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import FinetuneConfig, PretrainConfig
from gpsd_dist.schema import Manifest, Task
from gpsd_dist.stages import losses

NEXT_BEHAVIOUR = "next_behaviour"
"""Name of the auxiliary loss of `RankingObjective`."""


class Objective(typing.Protocol):
    """One per stage. L losses in a fixed order."""

    @property
    def weights(self) -> dict[str, float]:
        """Loss -> weight, in order."""

    def counts(self, batch: Batch) -> torch.Tensor:
        """float32 [L]: positions or labels of this batch; needs no model, so ranks can add them up beforehand."""

    def sums(self, model: nn.Module, rows: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """float32 [L]: runs the model and sums each loss over the batch."""


@dataclasses.dataclass(frozen=True)
class NextItemObjective:
    """Sampled softmax over items, and full softmax over each auxiliary feature of the next item."""

    config: PretrainConfig
    manifest: Manifest

    @property
    def weights(self) -> dict[str, float]:
        """See Objective."""
        return {"next_item": 1.0} | {f"next_{name}": self.config.auxiliary_weight for name in self.config.auxiliary}

    def counts(self, batch: Batch) -> torch.Tensor:
        """See Objective."""
        token_M = batch.next_item.token_M
        return torch.full((len(self.weights),), float(len(token_M)), device=token_M.device)

    def sums(self, model: nn.Module, rows: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """See Objective."""
        outputs, next_item = model(rows, batch), batch.next_item
        hidden_ME = outputs.hidden_TE.index_select(0, next_item.token_M)
        item = self.manifest.feature(self.manifest.item_feature)
        item_loss, _ = losses.sampled_softmax(
            hidden_ME,
            rows[item.table],
            batch.history[item.name][next_item.target_token_M],
            next_item.item_M,
            next_item.negative_row_GN,
            next_item.negative_item_GN,
            next_item.group_offsets,
            self.config.temperature,
        )
        sums = [item_loss]
        for name in self.config.auxiliary:
            target_M = batch.history[name][next_item.target_token_M]
            weight_VE = outputs.auxiliary_weight[name]
            sums.append(losses.full_softmax(hidden_ME, weight_VE, target_M, self.config.temperature)[0])
        return torch.stack(sums)


@dataclasses.dataclass(frozen=True)
class RankingObjective:
    """Cross entropy per task over the candidates whose label is observed; of a task given another, where that is 1.

    With ESMM a conditional task is trained through the product of both probabilities instead, over all candidates.
    With `next_behaviour_weight` the histories' states predict the next behaviour too; negatives are drawn from torch's
    generator, which is seeded every step.
    """

    config: FinetuneConfig
    tasks: tuple[Task, ...]

    @property
    def weights(self) -> dict[str, float]:
        """See Objective."""
        weights = {task.name: self.config.task_weights.get(task.name, 1.0) for task in self.tasks}
        return weights | ({NEXT_BEHAVIOUR: self.config.next_behaviour_weight} if self._has_auxiliary else {})

    def counts(self, batch: Batch) -> torch.Tensor:
        """See Objective."""
        counts = [(~self._label(task, batch).isnan()).sum() for task in self.tasks]
        if self._has_auxiliary:
            counts.append((_history_position(batch) > 0).sum())
        return torch.stack(counts).float()

    def sums(self, model: nn.Module, rows: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """See Objective."""
        if not self._has_auxiliary:
            logits = model(rows, batch)
            return torch.stack([self._loss(task, logits, batch) for task in self.tasks])
        logits, history = model(rows, batch, with_history=True)
        item_T = batch.history_item_T
        negative_T = torch.randint(max(len(item_T), 1), item_T.shape, device=item_T.device)
        auxiliary, _ = losses.next_behaviour(
            history.state_TN, history.token_TN, _history_position(batch), item_T, negative_T
        )
        return torch.stack([*(self._loss(task, logits, batch) for task in self.tasks), auxiliary])

    @property
    def _has_auxiliary(self) -> bool:
        return self.config.next_behaviour_weight > 0

    def _loss(self, task: Task, logits: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        label_C = self._label(task, batch)
        if self.config.esmm and task.given is not None:
            return losses.product_cross_entropy(logits[task.given], logits[task.name], label_C)[0]
        return losses.binary_cross_entropy(logits[task.name], label_C)[0]

    def _label(self, task: Task, batch: Batch) -> torch.Tensor:
        """float32 [C], NaN where the loss of the task does not count."""
        label_C = batch.labels[task.name]
        if task.given is None:
            return label_C
        combine = losses.product_label if self.config.esmm else losses.conditional_label
        return combine(label_C, batch.labels[task.given])


def _history_position(batch: Batch) -> torch.Tensor:
    """int64 [T]: place of each token in its history."""
    return batch.packing.position_S[: batch.packing.num_history_tokens]


def trained_tasks(config: FinetuneConfig, manifest: Manifest) -> tuple[Task, ...]:
    """Tasks with a weight above 0. ValueError for a weight of an unknown task, or one given a task that is left out."""
    names = [task.name for task in manifest.tasks]
    unknown = set(config.task_weights) - set(names)
    if unknown:
        raise ValueError(f"FinetuneConfig.task_weights names {sorted(unknown)}, but the data set has tasks {names}")
    tasks = tuple(task for task in manifest.tasks if config.task_weights.get(task.name, 1.0) > 0)
    kept = {task.name for task in tasks}
    for task in tasks:
        if config.esmm and task.given is not None and task.given not in kept:
            raise ValueError(f"ESMM trains {task.name!r} through {task.given!r}, whose weight is 0")
    if NEXT_BEHAVIOUR in kept and config.next_behaviour_weight:
        raise ValueError(f"task {NEXT_BEHAVIOUR!r} has the name of the auxiliary loss: rename it in the data set")
    if not tasks:
        raise ValueError(f"no task to train: the weights of {names} are all 0")
    return tasks

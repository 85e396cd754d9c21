"""Discriminative training: the state at every candidate gives a logit per task. arXiv:2506.03699, section 3.3.

Shape letters: C candidates, T history tokens, L losses.
"""

import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import FinetuneConfig, RunConfig
from gpsd_dist.config.model import MODELS, models_with
from gpsd_dist.metrics.binary_metrics import METRIC_KEYS
from gpsd_dist.metrics.classification import Predictions, gather_metrics
from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.schema import Manifest, Table, Task
from gpsd_dist.stages import captured, losses
from gpsd_dist.stages.candidate_scores import add_predictions
from gpsd_dist.stages.captured import Columns
from gpsd_dist.stages.next_behaviour import next_behaviour
from gpsd_dist.stages.stage import Components, Metrics, check_best_metric

NEXT_BEHAVIOUR = "next_behaviour"  # the auxiliary loss, in metrics beside the tasks: so no task may have this name


class Finetune:
    """Minimises the cross entropy of each task over the candidates whose label is observed.

    Where the data set has sample weights, sums and counts are weighted. Where negatives were sampled, the loss sees
    the logit of the sampled log, so that the model's own logit is that of the whole log.

    A task may be conditional: conversion given click. It is trained on the candidates where the other label is 1 (the
    clicked ones); with ESMM on all candidates, through the product of both probabilities. With `next_behaviour_weight`
    the states of the history also predict the next behaviour.
    """

    with_candidates: typing.ClassVar[bool] = True

    def __init__(self, run: RunConfig, manifest: Manifest):
        self.run, self.config, self.manifest = run, run.finetune, manifest
        self._has_auxiliary = self.config.next_behaviour_weight > 0
        self.tasks = trained_tasks(run.finetune, manifest)
        if self._has_auxiliary and not MODELS[run.model.name].supervises_history:
            able = models_with("supervises_history")
            raise ValueError(
                f"next_behaviour_weight {self.config.next_behaviour_weight}: model {run.model.name!r} has no history "
                f"states to supervise, only {able} have; leave the option out"
            )
        check_best_metric(run, [f"{task.name}/{key}" for task in self.tasks for key in METRIC_KEYS])
        self.loss_weights = {task.name: self.config.task_weights.get(task.name, 1.0) for task in self.tasks}
        if self._has_auxiliary:
            self.loss_weights[NEXT_BEHAVIOUR] = self.config.next_behaviour_weight
        # ESMM trains P(click and conversion), but the conditional task is scored on P(conversion given click): the gap
        # between the two losses would not be one of generalization.
        self.scored_losses = tuple(task.name for task in self.tasks if not (self.config.esmm and task.given))
        if "negative_rate" in manifest.sampling or ("weight" in manifest.sampling and not self.config.weighted_metrics):
            self.scored_losses = ()  # validation then weighs rows otherwise than training

    def model(self, sharded: tuple[Table, ...]) -> nn.Module:
        """Builds the tower, the embedding of the context, and an MLP head per task."""
        names = tuple(task.name for task in self.tasks)
        return RankingModel(self.manifest, self.run.tables, self.run.model, sharded, names, self.config.offset)

    def counts(self, batch: Batch) -> torch.Tensor:
        """Counts the observed labels of each task, and the history tokens that another one precedes: float32 [L]."""
        # Observed labels and not candidates: a label that the log does not have must not dilute the mean.
        counts = [losses.observed(self._label(task, batch.labels), batch.sampling.get("weight")) for task in self.tasks]
        if self._has_auxiliary:
            counts.append((_history_position(batch) > 0).sum())
        return torch.stack(counts).float()

    def loss_sums(self, model: nn.Module, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Sums the loss of each task over its observed labels: float32 [L]."""
        if self.run.execution.cuda_graphs and batch.padded is not None:
            return model(embeddings, batch, instead=captured.ranking_sums, sums=self._sums)
        if not self._has_auxiliary:
            return self._sums(model(embeddings, batch), batch.labels, batch.sampling)
        logits, history = model(embeddings, batch, with_history=True)
        item_T = batch.history_item_T
        # The other token may be of any user of the batch. Torch's generator is seeded by (seed, step, rank) in each
        # step, so a resumed run draws the same ones.
        negative_T = torch.randint(max(len(item_T), 1), item_T.shape, device=item_T.device)
        auxiliary = next_behaviour(history.state_TN, history.token_TN, _history_position(batch), item_T, negative_T)
        return torch.cat((self._sums(logits, batch.labels, batch.sampling), auxiliary[None]))

    def evaluate(
        self,
        components: Components,
        batches: typing.Iterable[tuple[Batch, ...]],
        rank_cut: int | None,
        keep: dict[str, Predictions] | None = None,
    ) -> Metrics:
        """Scores every candidate: task -> `binary_metrics.METRIC_KEYS`. Collective.

        `keep` gets the scores on rank 0; `rank_cut` belongs to next-item ranking and must be None.
        """
        if rank_cut is not None:
            raise ValueError(
                f"--rank_cut belongs to next-item ranking; this run scores {[task.name for task in self.tasks]}"
            )
        weighted = self.config.weighted_metrics or "negative_rate" in self.manifest.sampling
        predictions = {t.name: Predictions(with_items=keep is not None, with_weights=weighted) for t in self.tasks}
        for (host_batch,) in batches:
            components.runtime.watchdog.alive()
            batch, logits = self.score(components, host_batch)
            if logits:
                add_predictions(predictions, self.tasks, logits, batch, self.config.weighted_metrics)
        return gather_metrics(predictions, keep)

    def score(self, components: Components, host_batch: Batch) -> tuple[Batch, dict[str, torch.Tensor]]:
        """Scores a batch; returns it on the device, and task -> logits [C] (empty without requests). Collective."""
        # `assign` and not `train`: scoring must not admit ids, or a second pass would see other tables.
        (batch,) = components.ids.assign((host_batch.to(components.runtime.device),))
        # Ranks may run out of rows at different batches. Those still have to join the lookup, and under FSDP2 the
        # forward, because the other ranks wait for them there.
        embeddings = components.tables(batch.lookup)
        if batch.packing.num_requests or components.forward_is_collective:
            return batch, components.model(embeddings, batch)
        return batch, {}

    def default_metric(self, metrics: Metrics) -> str:
        """Chooses the best checkpoint by the AUC of the first task."""
        return f"{next(iter(metrics))}/auc"

    def _sums(self, logits: Columns, labels: Columns, sampling: Columns) -> torch.Tensor:
        return torch.stack([self._loss(task, logits, labels, sampling) for task in self.tasks])

    def _loss(self, task: Task, logits: Columns, labels: Columns, sampling: Columns) -> torch.Tensor:
        label_C, weight_C = self._label(task, labels), sampling.get("weight")
        if "negative_rate" in sampling:
            # Rows without the first event were sampled. What is conditional on it is not: all of its rows were kept.
            rate_C = sampling["negative_rate"]
            first = next(other.name for other in self.manifest.tasks if other.given is None)
            logits = logits | ({first: losses.sampled_logit(logits[first], rate_C)} if first in logits else {})
        # Trained on clicked candidates alone, a model of conversions would have to score candidates of a kind that it
        # never saw (sample selection bias). So ESMM trains the product, for which every candidate has a label.
        if self.config.esmm and task.given is not None:
            return losses.product_cross_entropy(logits[task.given], logits[task.name], label_C, weight_C)
        return losses.binary_cross_entropy(logits[task.name], label_C, weight_C)

    def _label(self, task: Task, labels: Columns) -> torch.Tensor:
        """Returns the target of the task's loss: float32 [C], NaN for candidates that are left out of it."""
        label_C = labels[task.name]
        if task.given is None:
            return label_C
        combine = losses.product_label if self.config.esmm else losses.conditional_label
        return combine(label_C, labels[task.given])


def _history_position(batch: Batch) -> torch.Tensor:
    """Gives the position of each token in its history: int64 [T], from 0."""
    return batch.packing.position_S[: batch.packing.num_history_tokens]


def trained_tasks(config: FinetuneConfig, manifest: Manifest) -> tuple[Task, ...]:
    """Returns the tasks with a weight above 0.

    ValueError for a weight of an unknown task, and under ESMM for a task whose condition is left out.
    """
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

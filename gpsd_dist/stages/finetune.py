"""Discriminative training: the state at every candidate gives a logit per task. arXiv:2506.03699, section 3.3.

Shape letters: C candidates, T history tokens, L losses.
"""

import typing

import torch
from torch import nn

from gpsd_dist.batch.batch import Batch
from gpsd_dist.config import FinetuneConfig, RunConfig
from gpsd_dist.config.model import MODELS, models_with
from gpsd_dist.metrics.classification import METRIC_KEYS, Predictions, gather_metrics
from gpsd_dist.model.gpsd import RankingModel
from gpsd_dist.schema import Manifest, Table, Task
from gpsd_dist.stages import losses
from gpsd_dist.stages.stage import Components, Metrics, check_best_metric

NEXT_BEHAVIOUR = "next_behaviour"  # the auxiliary loss, in metrics beside the tasks: so no task may have this name


class Finetune:
    """Minimises the cross entropy of each task over the candidates whose label is observed.

    A task may be conditional: conversion given click. It is trained on the candidates where the other label is 1 (the
    clicked ones); with ESMM on all candidates, through the product of both probabilities. With `next_behaviour_weight`
    the states of the history also predict the next behaviour.
    """

    with_candidates: typing.ClassVar[bool] = True

    def __init__(self, run: RunConfig, manifest: Manifest):
        self.run, self.config, self.manifest = run, run.finetune, manifest
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

    def model(self, sharded: tuple[Table, ...]) -> nn.Module:
        """Builds the tower, the embedding of the context, and an MLP head per task."""
        names = tuple(task.name for task in self.tasks)
        return RankingModel(self.manifest, self.run.tables, self.run.model, sharded, names)

    def counts(self, batch: Batch) -> torch.Tensor:
        """Counts the observed labels of each task, and the history tokens that another one precedes: float32 [L]."""
        # Observed labels and not candidates: a label that the log does not have must not dilute the mean.
        counts = [(~self._label(task, batch).isnan()).sum() for task in self.tasks]
        if self._has_auxiliary:
            counts.append((_history_position(batch) > 0).sum())
        return torch.stack(counts).float()

    def loss_sums(self, model: nn.Module, embeddings: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Sums the loss of each task over its observed labels: float32 [L]."""
        if not self._has_auxiliary:
            logits = model(embeddings, batch)
            return torch.stack([self._loss(task, logits, batch) for task in self.tasks])
        logits, history = model(embeddings, batch, with_history=True)
        item_T = batch.history_item_T
        # The other token may be of any user of the batch. Torch's generator is seeded by (seed, step, rank) in each
        # step, so a resumed run draws the same ones.
        negative_T = torch.randint(max(len(item_T), 1), item_T.shape, device=item_T.device)
        auxiliary = losses.next_behaviour(
            history.state_TN, history.token_TN, _history_position(batch), item_T, negative_T
        )
        return torch.stack([*(self._loss(task, logits, batch) for task in self.tasks), auxiliary])

    def evaluate(
        self,
        components: Components,
        batches: typing.Iterable[tuple[Batch, ...]],
        rank_cut: int | None,
        keep: dict[str, Predictions] | None = None,
    ) -> Metrics:
        """Scores every candidate: task -> `classification.METRIC_KEYS`. Collective.

        `keep` gets the scores on rank 0; `rank_cut` belongs to next-item ranking and must be None.
        """
        if rank_cut is not None:
            raise ValueError(
                f"--rank_cut belongs to next-item ranking; this run scores {[task.name for task in self.tasks]}"
            )
        runtime = components.runtime
        predictions = {task.name: Predictions(with_items=keep is not None) for task in self.tasks}
        for (host_batch,) in batches:
            runtime.watchdog.alive()
            # `assign` and not `train`: scoring must not admit ids, or a second pass would see other tables.
            (batch,) = components.ids.assign((host_batch.to(runtime.device),))
            # Ranks may run out of rows at different batches. Those still have to join the lookup, and under FSDP2 the
            # forward, because the other ranks wait for them there.
            embeddings = components.tables(batch.lookup)
            if batch.packing.num_requests or components.forward_is_collective:
                add_predictions(predictions, self.tasks, components.model(embeddings, batch), batch)
        return gather_metrics(predictions, keep)

    def default_metric(self, metrics: Metrics) -> str:
        """Chooses the best checkpoint by the AUC of the first task."""
        return f"{next(iter(metrics))}/auc"

    @property
    def _has_auxiliary(self) -> bool:
        return self.config.next_behaviour_weight > 0

    def _loss(self, task: Task, logits: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        label_C = self._label(task, batch)
        # Trained on clicked candidates alone, a model of conversions would have to score candidates of a kind that it
        # never saw (sample selection bias). So ESMM trains the product, for which every candidate has a label.
        if self.config.esmm and task.given is not None:
            return losses.product_cross_entropy(logits[task.given], logits[task.name], label_C)
        return losses.binary_cross_entropy(logits[task.name], label_C)

    def _label(self, task: Task, batch: Batch) -> torch.Tensor:
        """Returns the target of the task's loss: float32 [C], NaN for candidates that are left out of it."""
        label_C = batch.labels[task.name]
        if task.given is None:
            return label_C
        combine = losses.product_label if self.config.esmm else losses.conditional_label
        return combine(label_C, batch.labels[task.given])


def add_predictions(
    predictions: dict[str, Predictions], tasks: tuple[Task, ...], logits: dict[str, torch.Tensor], batch: Batch
) -> None:
    """Adds the scores of a batch. A conditional task is scored on the candidates where the other label is 1."""
    # The user goes along with each score, because GAUC is a mean of the AUCs of users, who may sit on several ranks.
    # The time of the request goes along for the GAUC within a user's day.
    request_C = batch.packing.request_C
    user_C, time_s_C = batch.user_hash_B[request_C], batch.request_time_s_B[request_C]
    for task in tasks:
        label_C = batch.labels[task.name]
        if task.given is not None:
            label_C = losses.conditional_label(label_C, batch.labels[task.given])
        logit_C, is_observed_C = logits[task.name].detach(), ~label_C.isnan()
        predictions[task.name].add(logit_C, label_C, user_C, is_observed_C, time_s_C, batch.candidate_item_C)


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

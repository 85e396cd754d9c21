"""Collects the scores of candidates for metrics: who is scored, with what weight. Shape letter: C candidates."""

import torch

from gpsd_dist.batch.batch import Batch
from gpsd_dist.metrics.classification import Predictions
from gpsd_dist.schema import Task
from gpsd_dist.stages import losses


def add_predictions(
    predictions: dict[str, Predictions],
    tasks: tuple[Task, ...],
    logits: dict[str, torch.Tensor],
    batch: Batch,
    is_weighted: bool = False,
) -> None:
    """Adds the scores of a batch. A conditional task is scored on the candidates where the other label is 1.

    `is_weighted`: with sample weights, if there are any. A negative of a sampled log always counts 1 / rate times, so
    that metrics are those of the whole log, as the scores are.
    """
    # The user goes along with each score, because GAUC is a mean of the AUCs of users, who may sit on several ranks.
    # The time of the request goes along for the GAUC within a user's day.
    request_C = batch.packing.request_C
    user_C, time_s_C = batch.user_hash_B[request_C], batch.request_time_s_B[request_C]
    history_C = batch.packing.position_S[
        batch.packing.num_history_tokens :
    ]  # of a candidate: the length of its history
    for task in tasks:
        label_C = batch.labels[task.name]
        if task.given is not None:
            label_C = losses.conditional_label(label_C, batch.labels[task.given])
        logit_C, is_observed_C = logits[task.name].detach(), ~label_C.isnan()
        weight_C = torch.ones_like(label_C)
        if is_weighted and "weight" in batch.sampling:
            weight_C = batch.sampling["weight"]
        if task.given is None and "negative_rate" in batch.sampling:
            weight_C = torch.where(label_C == 0, weight_C / batch.sampling["negative_rate"], weight_C)
        item_C = batch.candidate_item_C
        predictions[task.name].add(logit_C, label_C, user_C, is_observed_C, time_s_C, item_C, weight_C, history_C)

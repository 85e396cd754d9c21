"""Trains a model of your own, which lives in this file and not in the package.

    python -m examples.own_model
    gpsd-dist train --plugin examples/own_model.py --gin.ModelConfig.name=best_match --gin_file stage/finetune.gin ...

`gpsd-dist` takes `--plugin FILE` for train, fit, evaluate, export, serve; with `python -m` or torchrun, set the
environment variable GPSD_PLUGIN=FILE. Tables, heads, losses, transfer, freezing and serving are those of all models;
`gpsd_dist/model/registry.py` says what a tower has to offer.
Shape letters: S tokens in packed order (T of histories, then C candidates), F token features, D width, B requests,
P pairs of a candidate and an event of its history.
"""

import pathlib
import sys
import tempfile

import torch
from torch import nn

from gpsd_dist.batch.packing import Packing
from gpsd_dist.config import ModelConfig
from gpsd_dist.model.pairs import pair_up, split_tokens, sum_histories
from gpsd_dist.model.registry import register


class BestMatch(nn.Module):
    """Compares a candidate with each event of its history, and keeps the mean of the events and the best match."""

    reads_fields, has_segments, drops_inputs = True, False, False  # a token is one vector per feature
    direct_width = 1  # the best match goes straight to the output

    def __init__(self, config: ModelConfig, num_fields: int):
        super().__init__()
        channels = num_fields * config.width
        self.query = nn.Linear(channels, channels, bias=False)
        self.out_width, self.mlp_widths = 1 + 2 * channels, (2 * config.width, config.width)

    def forward(self, x_SFD: torch.Tensor, packing: Packing, candidates_only: bool = False, times=None) -> torch.Tensor:
        """Maps token vectors [S, F, D] to states of the candidates [C, 1 + 2 F D]."""
        history_TFD, candidate_CFD = split_tokens(x_SFD, packing, candidates_only)
        history_TN, candidate_CN = history_TFD.flatten(1), candidate_CFD.flatten(1)
        length_B1 = packing.history_offsets.diff().clamp(min=1)[:, None]
        mean_CN = (sum_histories(history_TN, packing) / length_B1)[packing.request_C]
        pairs = pair_up(packing)
        match_P = (self.query(candidate_CN)[pairs.candidate_P] * history_TN[pairs.token_P]).sum(-1)
        best_C = match_P.new_zeros(len(candidate_CN)).scatter_reduce(0, pairs.candidate_P, match_P, "amax")
        return torch.cat((best_C[:, None], mean_CN, candidate_CN), dim=1)


if __name__ != "__main__":  # as a plugin; else the command below starts this file as one
    register("best_match", BestMatch)
else:
    from examples.train_minimal import make_data
    from gpsd_dist.cli.main import main

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        options = [f"--gin.DATA_DIR={make_data(folder)}", f"--gin.OUTPUT_DIR={folder / 'run'}", "--gin.EPOCHS=3"]
        model = ["--plugin", __file__, "--gin.ModelConfig.name=best_match"]
        sys.exit(main(["train", *model, "--gin_file", "stage/finetune.gin", *options]))

"""Every model against numbers that the official code computed: `tests/assets/golden` (its README says how)."""

import unittest.mock

import numpy as np
import pytest
import torch

from gpsd_dist.model import din, dmin, hstu, sasrec, transformer, wukong
from gpsd_dist.stages import losses
from tests.helpers import golden as helper
from tests.helpers.golden import CASES, Golden, errors, pretraining, ranking

PRETRAINED = [name for name, case in CASES.items() if case.negatives_per]


@pytest.fixture(autouse=True)
def narrow_wukong():
    """The file has a hidden width of 32 where the models of a size to train have 512."""
    with unittest.mock.patch.object(wukong, "_FM_HIDDEN", 32):
        yield


def all_errors(name: str, **planted) -> dict[str, float]:
    made = Golden(name, **planted)
    found = errors(made, made.case.rows_of, *ranking(made))
    if made.case.negatives_per:
        found |= errors(made, "pretraining/", *pretraining(made))
    return found


@pytest.mark.parametrize("name", CASES)
def test_outputs_losses_and_gradients_are_the_official_ones(name):
    found = all_errors(name)
    assert len(found) > 10 and not {key: value for key, value in found.items() if value > 1}


@pytest.mark.parametrize("name", CASES)
def test_two_candidates_of_one_request_are_two_official_passes(name):
    """Rows 4 and 5 have one history: forward and backward are those of the rows apart."""
    made = Golden(name)
    requests = [[0], [1], [2], [3], [4, 5], *([row] for row in range(6, len(made.arrays["input/length"])))]
    found = errors(made, made.case.rows_of, *ranking(made, requests))
    assert found and not {key: value for key, value in found.items() if value > 1}


def test_the_mean_of_a_full_history_is_that_of_the_padded_official_deepfm():
    """It averages over padding too, so only a full history and an empty one have the same mean there and here."""
    made = Golden("deepfm")
    probability, official = ranking(made)[0]["probability"], made.arrays["output/probability"]
    rows = np.isin(made.arrays["input/length"], (0, 12))
    assert rows.sum() == 3 and helper.error(probability[rows], official[rows]) < helper.OUTPUTS_RTOL
    assert helper.error(probability[~rows], official[~rows]) > 1e-3


# --- changes of the code that must not go unseen ----------------------------------------------------------------------

CHANGED_CODE = {
    "norm eps of the Transformer": ("transformer", transformer, "_NORM_EPS", 1.1e-5),
    "base of the rotation": ("transformer", transformer, "ROPE_THETA", 10_010.0),
    "accidental hits": ("transformer", losses, "_mask_hits", lambda *_: None),
    "norm eps of HSTU": ("hstu", hstu, "NORM_EPS", 1.1e-6),
    "norm eps of SASRec": ("sasrec", sasrec, "_NORM_EPS", 1e-6),
    "ReLU before DeepFM's output": ("deepfm", torch.nn.Identity, "forward", lambda self, x: x.relu()),
    "activation of DIN": ("din", din.Dice, "forward", lambda self, x: x * torch.sigmoid(x)),
    "update gate of DIEN": ("dien", torch, "lerp", lambda old, new, weight: old + (new - old) * (weight + 1e-4)),
    "attention of DMIN": ("dmin", dmin, "attend", lambda qkv, _: qkv[:, 2].flatten(1)),
    "order of Wukong's slots": ("wukong", wukong, "_slots", lambda x_TFD, _: [x_TFD.reshape(6, -1, 8)]),
}
CHANGED_OPTIONS = {
    "temperature": ("transformer", {"temperature": 0.0501}),
    "temperature of HSTU": ("hstu", {"temperature": 0.0501}),
    "eps of the projections": ("transformer_projected", {"revision": 1}),
}


@pytest.mark.parametrize("change", CHANGED_CODE)
def test_a_changed_formula_is_seen(change, monkeypatch):
    name, place, attribute, value = CHANGED_CODE[change]
    monkeypatch.setattr(place, attribute, value)
    assert max(all_errors(name).values()) > 10  # times what is allowed


@pytest.mark.parametrize("change", CHANGED_OPTIONS)
def test_a_changed_option_is_seen(change):
    name, options = CHANGED_OPTIONS[change]
    assert max(all_errors(name, **options).values()) > 10

"""Fits a small log from Python, looks at the outcome, exports the chosen model and scores a request with it.

    python -m examples.notebook

Each paragraph of `main` is what one would type into a cell of a notebook. `gpsd_dist/api.py` documents the calls.
"""

import pathlib
import tempfile

from examples.train_minimal import make_data
from gpsd_dist import api


def main(folder: pathlib.Path) -> api.Fit:
    """Returns the outcome of the fit."""
    data = make_data(folder)

    options = {"EPOCHS": 1, "TrainConfig.max_steps": 60}
    run = api.fit(
        data,
        folder / "fit",
        strategies=["NT", "FT_SF"],
        nproc=1,
        refit=False,
        options=options,
        pretrain_options=options,
    )

    print(run.table)
    print(run.verdict)
    print("test AUC:", run.evaluate("test")["click"]["auc"])

    scorer = run.export(folder / "artefact")
    context = {f"context.{name}": None for name in ("age_group", "region", "activity")}  # not known: null
    request = {"user_id": "7", "request_time_s": 1_700_000_000} | context
    history = {"history.item": ["1"], "history.time_s": [1_699_990_000], "history.event": ["click"]}
    candidates = {"candidate.item": ["2", "3"], "candidate.slot": [0, 1], "candidate.tab": [None, None]}
    (answer,) = scorer.score([request | history | candidates])
    print("probabilities of a click:", answer.tasks["click"]["probability"])
    return run


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(pathlib.Path(scratch))

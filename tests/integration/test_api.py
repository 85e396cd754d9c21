"""The Python API: a fit from a call, its table, its scores, its artefact."""

import json
import logging

import pytest

from gpsd_dist import api
from gpsd_dist.fit import procedure
from tests.helpers import forked
from tests.helpers.commands import TINY_GIN
from tests.integration.tiny_data import write_tiny_data

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    write_tiny_data(folder / "data", rows={"train": 60, "valid": 40, "test": 40})
    (folder / "tiny.gin").write_text(TINY_GIN + "EPOCHS = 1\n")
    logger = logging.getLogger("gpsd_dist")
    before = logger.handlers, logger.level, logger.propagate
    files = [folder / "tiny.gin"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(procedure, "start_server", forked.command_server)
        made = api.fit(
            folder / "data",
            folder / "fit",
            strategies=["NT"],
            nproc=1,
            gin_files=["stage/finetune.gin", *files],
            options={"WIDTH": 8},
        )
        yield made
    logger.handlers, logger.level, logger.propagate = before


def test_table_has_a_row_per_model_baseline_and_task(run):
    labels = [(row["label"], row["task"]) for row in run.table]
    assert ("popularity", "click") in labels and ("NT", "buy") in labels and ("NT refit", "click") in labels
    assert len(repr(run.table).splitlines()) == 1 + len(labels)
    assert run.table._repr_html_().count("<tr>") == 1 + len(labels)
    assert run.verdict in repr(run) and run.report.is_file()
    assert json.loads((run.chosen() / "run_config.json").read_text())["model"]["width"] == 8


def test_evaluate_gives_the_numbers_of_the_table(run):
    (row,) = [row for row in run.table if row["label"] == "NT refit" and row["task"] == "click"]
    assert run.chosen("test").name == "nt_refit" and run.chosen("valid").name == "nt"
    with pytest.raises(ValueError, match="tset"):
        run.evaluate("tset")  # which leaves the next call alone
    assert run.evaluate("test")["click"]["auc"] == pytest.approx(row["auc"], abs=1e-9)


def test_a_refit_that_the_outcome_lacks_is_not_chosen(tmp_path):
    """It was interrupted, or the fit was asked again with --no_refit."""
    (tmp_path / "nt_refit").mkdir()
    (tmp_path / "nt_refit" / "run_config.json").write_text("{}")
    (tmp_path / "fit.json").write_text('{"chosen": "nt"}')
    (tmp_path / "summary.json").write_text('{"verdict": "better", "refit": []}')
    assert api.Fit(tmp_path).chosen("test") == tmp_path / "nt"


def test_an_earlier_fit_is_opened(run):
    assert api.Fit(run.folder).table == run.table


def test_an_export_scores_raw_requests(run, tmp_path):
    scorer = run.export(tmp_path / "artefact")
    assert api.load(tmp_path / "artefact").version == scorer.version


def test_what_cannot_be_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="holds no finished fit"):
        api.Fit(tmp_path)
    with pytest.raises(ValueError, match="cannot be meant"):
        api.fit(tmp_path, tmp_path / "out", nproc=0)
    with pytest.raises(ValueError, match="is empty: build it from your log first"):
        api.fit(tmp_path, tmp_path / "out", nproc=1)

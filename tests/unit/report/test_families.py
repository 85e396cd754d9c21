"""Which runs share a table, and which share a row."""

import pytest

from gpsd_dist.report import dataset
from gpsd_dist.report.families import differing_options, group
from gpsd_dist.report.run_folder import find_runs, read_runs
from tests.helpers.run_folders import write_run


def families(root):
    runs = read_runs(find_runs([root])[0])
    return group(runs, dataset.data_sets(runs)[0])


def rows(family) -> dict[str, str]:
    """Label -> seeds."""
    return {configuration.label: configuration.seeds for configuration in family.configurations}


def test_seeds_share_a_row_in_the_order_of_the_paper(tmp_path):
    write_run(tmp_path / "runs/pretrain", stage="pretrain")
    for seed in (10, 2):
        for strategy in ("FT_SF", "NT", "ST"):
            write_run(tmp_path / f"runs/s{seed}/{strategy}", strategy, seed)
    pretraining, finetuning = families(tmp_path)
    assert (pretraining.title, finetuning.title) == ("data/handmade: pretraining", "data/handmade: finetuning")
    assert rows(pretraining) == {"pretraining": "0"}
    assert list(rows(finetuning).items()) == [("NT", "2, 10"), ("ST", "2, 10"), ("FT_SF", "2, 10")]


def test_seeds_with_a_pretraining_each_share_a_row(tmp_path):
    for seed in (0, 1):
        pretraining = write_run(tmp_path / f"s{seed}/pretrain", stage="pretrain", seed=seed)
        write_run(tmp_path / f"s{seed}/st", "ST", seed, init_checkpoint=pretraining)
    assert rows(families(tmp_path)[1]) == {"ST": "0, 1"}


def test_relative_and_moved_pretrainings_are_recognised(tmp_path):
    """By the end of the path, and by the folder that the pretraining says it was written to."""
    write_run(tmp_path / "runs/p", stage="pretrain", options={"output_dir": "old/place"})
    write_run(tmp_path / "runs/a", "ST", 0, init_checkpoint="runs/p")
    write_run(tmp_path / "runs/b", "ST", 1, init_checkpoint="old/place")
    write_run(tmp_path / "runs/c", "ST", 2, init_checkpoint="runs/p/checkpoints/step_00000040")
    assert rows(families(tmp_path)[1]) == {
        "ST, init_checkpoint=runs/p": "0, 1",
        "ST, init_checkpoint=runs/p/checkpoints/step_00000040": "2",
    }


def test_different_pretrainings_do_not_share_a_row(tmp_path):
    for seed, temperature in ((0, 0.05), (1, 0.1)):
        options = {"pretrain.temperature": temperature}
        pretraining = write_run(tmp_path / f"s{seed}/pretrain", stage="pretrain", seed=seed, options=options)
        write_run(tmp_path / f"s{seed}/st", "ST", seed, init_checkpoint=pretraining)
    assert len(rows(families(tmp_path)[1])) == 2


def test_unknown_pretraining_counts_by_its_path(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"runs/s{seed}", "ST", seed, init_checkpoint=f"gone/s{seed}")
    assert rows(families(tmp_path)[0]) == {"ST, init_checkpoint=gone/s0": "0", "ST, init_checkpoint=gone/s1": "1"}


def test_refits_share_a_row_of_their_own(tmp_path):
    for seed in (0, 1):
        tuned = write_run(tmp_path / f"tune/s{seed}", seed=seed)
        write_run(tmp_path / f"final/s{seed}", seed=seed, options={"refit_of": str(tuned)})
    assert rows(families(tmp_path)[0]) == {"NT": "0, 1", "NT refit": "0, 1"}


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"sparse.peak_lr": 0.01}, "NT, sparse.peak_lr=0.01"),
        ({"model.layers": 12}, "NT transformer L12H64A4"),
        ({"model.name": "din", "model.layers": 9}, "NT din H64"),  # it has no layers
        (
            {"train.epochs": 1, "train.patience": 2, "dense.eps": 0.5},
            "NT, dense.eps=0.5 train.epochs=1 and 1 more option",
        ),
    ],
)
def test_label_says_what_is_different(tmp_path, options, label):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", options=options)
    assert label in rows(families(tmp_path)[0])


def test_data_that_was_rebuilt_between_runs_is_two_data_sets(tmp_path):
    write_run(tmp_path / "b")
    folder = write_run(tmp_path / "a", seed=1)
    (folder / "metrics.jsonl").write_text('{"step": 1, "wall_time_s": 1e10}\n')  # later than b: version 2
    state = folder / "checkpoints/step_00000040/run_state.json"
    state.write_text(state.read_text().replace('"num_rows": 1234', '"num_rows": 1235'))
    assert {family.title: family.runs[0].label for family in families(tmp_path)} == {
        "data/handmade, version 1: finetuning": "b",
        "data/handmade, version 2: finetuning": "a",
    }


def test_run_without_configuration_stands_alone(tmp_path):
    write_run(tmp_path / "a")
    (write_run(tmp_path / "b") / "run_config.json").unlink()
    unknown, known = families(tmp_path)
    assert unknown.title.endswith("unknown stage") and rows(unknown) == {"b": "?"}
    assert rows(known) == {"NT": "0"}


def test_differing_options_include_those_that_one_run_does_not_have(tmp_path):
    write_run(tmp_path / "a", options={"old_option": 1, "train.epochs": 7})
    write_run(tmp_path / "b", seed=5)
    runs = read_runs(find_runs([tmp_path])[0])
    assert differing_options(runs) == ["output_dir", "seed", "train.epochs", "old_option"]


def test_a_stage_of_ones_own_has_a_family_of_its_name(tmp_path):
    for index, stage in enumerate(("dwell", "finetune", "pretrain")):
        write_run(tmp_path / f"{index}", options={"stage": stage})
    titles = [family.title.rsplit(": ", 1)[1] for family in families(tmp_path)]
    assert titles == ["pretraining", "finetuning", "stage dwell"]

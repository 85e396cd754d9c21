import dataclasses
import json
import math

import pytest

from gpsd_dist.config import FinetuneConfig, ModelConfig, RunConfig, TrainConfig
from gpsd_dist.scaling import epochs


def write_run(folder, strategy="NT", *, seed=0, auc=(0.7, 0.6), gap=(0.0, 0.2), data_dir="data/a", kept=(), **parts):
    """Two steps per epoch, one validation at each epoch's end; `gap` None: a run without one."""
    init = "" if strategy == "NT" else "runs/pretrain"
    run = RunConfig("finetune", data_dir, str(folder), strategy, init, seed=seed, **parts)
    folder.mkdir(parents=True)
    (folder / "run_config.json").write_text(json.dumps(dataclasses.asdict(run)))
    lines = []
    for epoch, value in enumerate(auc, 1):
        lines.append({"step": 2 * epoch - 1, "epoch": epoch - 0.5, "train/click_loss": 0.6})
        entry = {"step": 2 * epoch, "epoch": float(epoch), "train/click_loss": 0.4}
        entry |= {"valid/click/auc": value, "valid/click/log_loss": 0.7}
        lines.append(entry | ({} if gap is None else {"gap/click_log_loss": gap[epoch - 1]}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in kept:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (folder / f"checkpoints/step_{step:08d}/run_state.json").touch()
    return folder


def test_curves_of_a_run(tmp_path):
    curves = epochs.read_run(write_run(tmp_path / "a", "ST_SF", auc=(0.7, None), gap=(0.01, 0.02)))
    assert curves.label == "ST_SF l4h64a4" and curves.steps == [(1.0, 2), (2.0, 4)]
    assert curves.gap == {"click": [(1.0, 0.01), (2.0, 0.02)]}
    assert curves.valid_auc["click"][0] == (1.0, 0.7) and math.isnan(curves.valid_auc["click"][1][1])


def test_half_written_last_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "epo')
    assert len(epochs.read_run(folder).steps) == 2


def test_broken_line_is_named(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([lines[0], '{"step": 2,\n', *lines[2:]]))
    with pytest.raises(ValueError, match=r"a/metrics\.jsonl, line 2 is not JSON; remove it, or leave this run out"):
        epochs.read_run(folder)


def test_losses_that_are_not_comparable_give_no_gap(tmp_path):
    curves = epochs.read_run(write_run(tmp_path / "a", gap=None, finetune=FinetuneConfig(esmm=True)))
    assert curves.gap["click"] == []
    epochs.epochs_figure([curves])  # its panel stays empty


def test_what_is_no_finished_finetuning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        epochs.read_run(tmp_path)
    pretraining = write_run(tmp_path / "pretrain")
    run = RunConfig("pretrain", "data/a", "runs/pretrain")
    (pretraining / "run_config.json").write_text(json.dumps(dataclasses.asdict(run)))
    with pytest.raises(ValueError, match="is a pretrain run"):
        epochs.read_run(pretraining)
    with pytest.raises(ValueError, match="has no validation"):
        epochs.read_run(write_run(tmp_path / "new", auc=()))


def test_runs_on_other_data_or_with_other_tasks_do_not_share_a_figure(tmp_path):
    one = epochs.read_run(write_run(tmp_path / "one"))
    other = epochs.read_run(write_run(tmp_path / "other", data_dir="data/b"))
    epochs.check_comparable([one, one])
    with pytest.raises(ValueError, match=r"data_dir: .*data/a.*data/b"):
        epochs.check_comparable([one, other])
    with pytest.raises(ValueError, match="tasks"):
        epochs.check_comparable([one, dataclasses.replace(one, valid_auc={"buy": []})])


def test_every_epochs_checkpoint_is_needed_to_score_test(tmp_path):
    ends = epochs.epoch_ends(epochs.read_run(write_run(tmp_path / "all", kept=(2, 4))))
    assert [(epoch, path.name) for epoch, path in ends] == [(1.0, "step_00000002"), (2.0, "step_00000004")]
    with pytest.raises(ValueError, match=r"of 2 epochs the checkpoints step_00000002 .*keep_last=2"):
        epochs.epoch_ends(epochs.read_run(write_run(tmp_path / "last", kept=(4,))))


def test_checkpoints_of_epochs_may_be_elsewhere_and_of_a_second_attempt(tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    run = write_run(tmp_path / "run", train=TrainConfig(checkpoint_dir=elsewhere))
    for name in ("step_00000002", "step_00000004", "step_00000004.1"):
        (tmp_path / "elsewhere/checkpoints" / name).mkdir(parents=True)
        (tmp_path / "elsewhere/checkpoints" / name / "run_state.json").touch()
    assert [path.name for _, path in epochs.epoch_ends(epochs.read_run(run))] == ["step_00000002", "step_00000004.1"]


def test_last_validation_of_each_epoch_counts_where_none_is_at_its_end(tmp_path):
    curves = epochs.read_run(write_run(tmp_path / "a", kept=(9, 18, 27)))
    curves = dataclasses.replace(curves, steps=[(0.47, 9), (0.95, 18), (1.42, 27)])
    assert [path.name for _, path in epochs.epoch_ends(curves)] == ["step_00000018", "step_00000027"]


def test_mean_goes_as_far_as_all_seeds_do():
    assert epochs.mean_curve([[(1, 0.5), (2, 0.6), (3, 0.7)], [(1, 0.7), (2, 0.8)]]) == [
        (1, pytest.approx(0.6)), (2, pytest.approx(0.7))]  # fmt: skip


def test_figure_has_a_line_per_strategy_and_one_per_seed(tmp_path):
    runs = [write_run(tmp_path / "st_sf", "ST_SF")]
    runs += [write_run(tmp_path / f"nt{seed}", seed=seed, auc=(0.6 + seed / 10, 0.5)) for seed in (0, 1)]
    runs += [write_run(tmp_path / "wide", model=ModelConfig(width=128), train=TrainConfig(epochs=2))]
    curves = [epochs.read_run(folder) for folder in runs]
    figure = epochs.epochs_figure(curves)
    left, right = figure.axes
    labelled = {line.get_label(): line for line in left.lines if not line.get_label().startswith("_")}
    assert list(labelled) == ["NT l4h128a4", "NT l4h64a4 (2 seeds)", "ST_SF l4h64a4"]
    assert list(labelled["NT l4h64a4 (2 seeds)"].get_ydata()) == pytest.approx([0.65, 0.5])
    assert labelled["NT l4h128a4"].get_color() == labelled["NT l4h64a4 (2 seeds)"].get_color()
    assert labelled["NT l4h128a4"].get_linestyle() != labelled["NT l4h64a4 (2 seeds)"].get_linestyle()
    assert len(left.lines) == 3 + 2 + 1  # means, seeds, the mark of epoch 1
    assert (left.get_ylabel(), right.get_ylabel()) == ("click: AUC on valid", "click: log loss, valid - train")
    assert not any("test" in label for label in labelled)
    tested = [dataclasses.replace(curves[0], test_auc={"click": [(1.0, 0.6), (2.0, 0.61)]})]
    labels = epochs.epochs_figure(tested).axes[0].get_legend_handles_labels()[1]
    assert labels == ["ST_SF l4h64a4", "ST_SF l4h64a4, test"]
    assert json.loads(json.dumps(epochs.as_json(tested)))[0]["test_auc"] == {"click": [[1.0, 0.6], [2.0, 0.61]]}

import numpy as np
import pytest
from matplotlib.image import imread

from gpsd_dist.scaling import figures
from gpsd_dist.scaling.summary import fit_all

SIZES = {"l1h32a4": 13_000, "l4h32a4": 52_000, "l4h64a4": 210_000, "l4h128a4": 840_000}


def make_points(rungs=SIZES, seeds=(0, 1), tasks=("click", "buy"), first_auc=None):
    random = np.random.default_rng(0)
    points = [
        {
            "rung": rung,
            "seed": seed,
            "task": task,
            "dense_parameters": size,
            "auc": 0.7097 - 0.7553 * size**-0.2364 + 0.001 * random.standard_normal(),
            "log_loss": 0.5 + 0.7553 * size**-0.2364 + 0.001 * random.standard_normal(),
        }
        for rung, size in rungs.items()
        for seed in seeds
        for task in tasks
    ]
    if first_auc is not None:
        points[0]["auc"] = None
    return points


def draw(points):
    fits, notes = fit_all(points)
    return figures.scaling_figure(points, fits, "FT_SF"), fits, notes


def test_one_panel_per_task_and_metric_with_curve_band_and_every_seed():
    points = make_points()
    figure, fits, notes = draw(points)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "click: AUC", "click: log loss", "buy: AUC", "buy: log loss"]  # fmt: skip
    for axes, task, metric in zip(figure.axes, ("click", "click", "buy", "buy"), ("auc", "log_loss") * 2, strict=True):
        assert axes.get_xscale() == "log" and "dense parameters" in axes.get_xlabel()
        assert {text.get_text() for text in axes.texts} == set(SIZES)
        drawn = np.concatenate([line.get_ydata() for line in axes.lines])
        measured = [point[metric] for point in points if point["task"] == task]
        assert np.isin(measured, drawn).all()
        labels = axes.get_legend_handles_labels()[1]
        assert sorted(labels) == ["95 % band of the curve", "fit", "mean and range over seeds"]
        (curve,) = [line for line in axes.lines if line.get_label() == "fit"]
        assert curve.get_ydata() == pytest.approx(fits[task][metric].predict(curve.get_xdata()))
        assert len(axes.collections) >= 1  # the band
    assert notes == []


def test_too_few_sizes_are_drawn_without_a_curve_and_noted():
    three = dict(list(SIZES.items())[:3])
    figure, fits, notes = draw(make_points(three, tasks=("click",)))
    assert fits == {"click": {"auc": None, "log_loss": None}}
    assert notes[0] == "click auc: no fit is possible with 3 distinct sizes; at least 4 needed"
    assert all(axes.get_title() == "no fit: fewer than 4 sizes" for axes in figure.axes)
    assert all(line.get_label() != "fit" for axes in figure.axes for line in axes.lines)


def test_undefined_metric_is_left_out_and_noted():
    _, fits, notes = draw(make_points(tasks=("click",), first_auc="undefined"))
    assert len(fits["click"]["auc"].y_n) == 7 and len(fits["click"]["log_loss"].y_n) == 8
    assert "click auc: left out, because the metric is undefined: l1h32a4 seed 0" in notes


def test_scatter_of_rungs_beyond_that_of_seeds_is_noted():
    more = {f"l{n}h32a4": 10_000 * 3**n for n in range(7)}
    points = make_points(more, seeds=(0, 1, 2), tasks=("click",))
    for point in points:
        point["auc"] += 0.01 * (-1) ** int(point["rung"][1])
    _, _, notes = draw(points)
    assert any("click auc: rungs leave the curve by more than seeds scatter" in note for note in notes)


def test_files_are_a_picture_and_the_same_bytes_for_the_same_numbers(tmp_path):
    written = [figures.save(draw(make_points(tasks=("click",)))[0], tmp_path / name, "scaling") for name in "ab"]
    assert [path.name for path in written[0]] == ["scaling.png", "scaling.svg"]
    assert [path.read_bytes() for path in written[0]] == [path.read_bytes() for path in written[1]]
    picture = imread(written[0][0])
    assert picture.shape[1] > 1000 and picture.std() > 0.05
    assert written[0][1].read_text().lstrip().startswith("<?xml")

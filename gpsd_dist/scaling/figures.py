"""Draws a ladder like figure 5 of arXiv:2506.03699: metrics over dense parameters, with the fitted curves.

Matplotlib is used without pyplot: no window, no global state. Equal numbers give files of equal bytes.
"""

import collections
import collections.abc
import io
import pathlib
import typing

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from gpsd_dist.scaling.fit import LAWS, Fit
from gpsd_dist.scaling.runs import replace_file

LABELS = {"auc": "AUC", "log_loss": "log loss"}
Fits = dict[str, dict[str, Fit | None]]  # task -> metric -> fit
_POINT, _CURVE = "#1f5fa8", "#c2491d"
_PANEL_INCHES = (5.6, 3.9)
_CURVE_POINTS = 120


def scaling_figure(points: collections.abc.Sequence[dict[str, typing.Any]], fits: Fits, title: str) -> Figure:
    """Draws a row of panels per task, a column per metric: seeds, mean and range of each rung, curve and band."""
    figure = panels(len(fits), len(LAWS), title)
    for row, (task, laws) in enumerate(fits.items()):
        for column, metric in enumerate(LAWS):
            axes = figure.axes[row * len(LAWS) + column]
            rows = [p for p in points if p["task"] == task and p[metric] is not None]
            _draw_points(axes, rows, metric)
            _draw_fit(axes, laws[metric])
            axes.set(xscale="log", xlabel="dense parameters (without tables)", ylabel=f"{task}: {LABELS[metric]}")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(x=0.08, y=0.18)
    return figure


def _draw_points(axes: Axes, rows: list[dict[str, typing.Any]], metric: str) -> None:
    rungs = collections.defaultdict(list)
    for row in rows:
        rungs[row["dense_parameters"], row["rung"]].append(row[metric])
    for index, ((size, rung), values) in enumerate(sorted(rungs.items())):
        mean = float(np.mean(values))
        if len(values) > 1:
            axes.plot([size] * len(values), values, "o", color=_POINT, alpha=0.35, markersize=4, markeredgewidth=0)
            spread = [[mean - min(values)], [max(values) - mean]]
            axes.errorbar(size, mean, yerr=spread, color=_POINT, capsize=3, linewidth=1)
        label = "measured" if len(rows) == len(rungs) else "mean and range over seeds"
        axes.plot(size, mean, "o", color=_POINT, markersize=6, label=label if index == 0 else None, zorder=3)
        beside = (0, 9) if index % 2 else (0, -15)  # so that labels of similar sizes do not overlap
        axes.annotate(rung, (size, mean), xytext=beside, textcoords="offset points", ha="center", fontsize=7)


def _draw_fit(axes: Axes, fit: Fit | None) -> None:
    if fit is None:
        axes.set_title("no fit: fewer than 4 sizes", fontsize=9)
        return
    x = np.geomspace(fit.x_n.min() / 1.3, fit.x_n.max() * 1.3, _CURVE_POINTS)
    low, high = fit.band(x)
    axes.plot(x, fit.predict(x), color=_CURVE, linewidth=1.5, label="fit")
    axes.fill_between(x, low, high, color=_CURVE, alpha=0.15, linewidth=0, label="95 % band of the curve")
    sign = "+" if fit.law.sign > 0 else "-"
    doubt = ", not determined by these points" if fit.not_determined() else ""
    axes.set_title(f"{fit.c:.4f} {sign} {fit.a:.4g} x^-{fit.b:.4f}   R^2 {fit.r2():.3f}{doubt}", fontsize=9)
    values = np.append(fit.y_n, fit.predict(x))
    room = 1.5 * max(float(np.ptp(values)), 1e-4)  # a band without bounds must not flatten the points
    axes.set_ylim(max(float(low.min()), values.min() - room), min(float(high.max()), values.max() + room))
    axes.legend(fontsize=7, frameon=False)


def panels(rows: int, columns: int, title: str) -> Figure:
    """Makes an empty figure with rows x columns axes."""
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes in np.ravel(figure.subplots(rows, columns, squeeze=False)):
        axes.grid(True, alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, out_dir: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Writes NAME.png and NAME.svg, each by rename."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(content, format=kind, dpi=150, metadata=metadata)
        paths.append(out_dir / f"{name}.{kind}")
        replace_file(paths[-1], content.getvalue())
    return paths

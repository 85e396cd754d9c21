"""Draws lines and dots with matplotlib as inline SVG. Knows nothing of runs.

Colours in the SVG are CSS variables of the page (`--c0` ... `--c7`, `--fig-text`, `--fig-grid`), so that one drawing
serves light and dark. Text stays text, in the page's font. Equal input gives equal bytes.
"""

import dataclasses
import io
import math
import re
import textwrap
import typing
import xml.etree.ElementTree as ET

import markupsafe
import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

NUM_COLORS = 8
DASHES = ("", "5 2", "1.5 1.8", "7 2 1.5 2")  # by seed
_MARKERS = ("o", "s", "^", "D")  # beyond NUM_COLORS configurations, colours come again with another marker
_WIDTH_PT, _HEIGHT_PT = 374, 232
_SMALL = (300, 170)
MIN_SPAN = 0.05  # of an axis, as a part of the largest value on it
_LABEL_WIDTH = 52  # letters of a line of text as wide as a figure
_MOST_MARKERS = 15  # per line; more would hide it
_TICK_STEPS = [1, 2, 2.5, 5, 10]
_TEXT, _GRID, _MUTED = "#0a0101", "#0a0202", "#0a0303"  # stand for CSS variables until the SVG is written
_VARIABLES = {_TEXT: "var(--fig-text)", _GRID: "var(--fig-grid)", _MUTED: "var(--fig-muted)"}
_VARIABLES |= {f"#0b01{i:02x}": f"var(--c{i})" for i in range(NUM_COLORS)}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FIGURE_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gpsd_dist",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout does not depend on the machine
    "font.size": 10.5,
    "text.parse_math": False,  # a name may hold dollars
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "path.simplify": True,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """Describes one curve. A NaN in `y` breaks it."""

    label: str  # shown by the browser when the pointer rests on the line
    x: tuple[float, ...]
    y: tuple[float, ...]
    style_index: int = 0  # colour, and marker beyond the number of colours
    dash_index: int = 0
    has_markers: bool = False
    is_muted: bool = False  # grey and thin: something to compare with
    ring_x: float | None = None  # the point at this x is circled
    is_stopped: bool = False  # its last point is crossed


@dataclasses.dataclass(frozen=True)
class Dots:
    """Describes one row of a strip chart: a value per seed; the mean is drawn as a bar across."""

    label: str
    values: tuple[float, ...]
    style_index: int = 0
    half_width: float = math.nan  # of the interval of the mean; NaN: not known
    is_muted: bool = False


@dataclasses.dataclass(frozen=True)
class Points:
    """Describes one value with its interval per group; NaN where there is none."""

    label: str
    values: tuple[float, ...]
    half_widths: tuple[float, ...]
    style_index: int = 0
    is_muted: bool = False


def style_color(index: int) -> int:
    """Returns the number of the style's colour."""
    return index % NUM_COLORS


def style_dash(index: int) -> str:
    """Returns the SVG dash pattern of the n-th seed."""
    return DASHES[index % len(DASHES)]


def has_shapes(num_styles: int) -> bool:
    """Whether there are more styles than colours, so that markers tell lines apart, too."""
    return num_styles > NUM_COLORS


def line_figure(
    lines: typing.Sequence[Line],
    name: str,
    description: str,
    *,
    x_label: str,
    zero_line: bool = False,
    y_range: tuple[float, float] | None = None,
    is_small: bool = False,
) -> str:
    """Draws curves as an SVG element. `name` is unique on the page; `description` is for screen readers."""
    with matplotlib.rc_context(_FIGURE_STYLE):
        figure, axes = _figure(*(_SMALL if is_small else (_WIDTH_PT, _HEIGHT_PT)))
        titles = {}
        for index, line in enumerate(lines):
            _draw(axes, line, f"line-{index}")
            titles[f"line-{index}"] = line.label
        if zero_line:
            axes.axhline(0, color=_MUTED, linewidth=1, zorder=1)
        axes.set_ylim(*_at_least(y_range or axes.get_ylim()))
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_TICK_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(_step_text))
        axes.yaxis.set_major_locator(MaxNLocator(4 if is_small else 5, steps=_TICK_STEPS))
        if max(map(abs, axes.get_ylim())) >= 10_000:
            axes.yaxis.set_major_formatter(FuncFormatter(_step_text))
        axes.grid(axis="y", linewidth=0.7)
        return _inline(figure, name, description, titles)


def strip_figure(rows: typing.Sequence[Dots], name: str, description: str, *, x_label: str) -> str:
    """Draws one row of dots per entry, top to bottom, below its label, as an SVG element."""
    labels = [textwrap.fill(row.label, _LABEL_WIDTH) for row in rows]
    heights = [0.62 + 0.36 * (1 + label.count("\n")) for label in labels]  # in rows; a line of text takes 0.36
    with matplotlib.rc_context(_FIGURE_STYLE):
        figure, axes = _figure(_WIDTH_PT, 50 + 36 * sum(heights))
        titles, y = {}, 0.0
        for index, (row, label, height) in enumerate(zip(rows, labels, heights, strict=True)):
            y += height
            color, finite = _color(row.style_index, row.is_muted), [v for v in row.values if math.isfinite(v)]
            marker = _MARKERS[row.style_index // NUM_COLORS % len(_MARKERS)]
            axes.text(0.0, y - 0.3, label, transform=axes.get_yaxis_transform(), va="bottom")
            if finite:
                axes.plot(finite, [y] * len(finite), marker, color=color, markersize=5.5, gid=f"dots-{index}")
                mean = sum(finite) / len(finite)
                axes.plot([mean, mean], [y - 0.22, y + 0.22], color=color, linewidth=2.2)
                words = f"{row.label}: " + ", ".join(f"{value:.4f}" for value in finite)
                if math.isfinite(row.half_width):
                    axes.plot([mean - row.half_width, mean + row.half_width], [y, y], color=color, linewidth=1.2)
                    words += f", 95 % interval of the mean +- {row.half_width:.4f}"
                titles[f"dots-{index}"] = words
        axes.set_yticks([])
        axes.set_ylim(y + 0.5, 0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=_TICK_STEPS))
        axes.margins(x=0.06)
        axes.set_xlim(*_at_least(axes.get_xlim()))
        axes.set_xlabel(x_label)
        axes.grid(axis="x", linewidth=0.7)
        return _inline(figure, name, description, titles)


def group_figure(
    groups: typing.Sequence[str],
    rows: typing.Sequence[Points],
    name: str,
    description: str,
    *,
    y_label: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    level: float | None = None,
) -> str:
    """Draws a value with its interval for each group, one row of points per entry, as an SVG element.

    A grey line across is drawn at `level`.
    """
    is_tall = sum(map(len, groups)) > _LABEL_WIDTH  # then labels stand upright
    with matplotlib.rc_context(_FIGURE_STYLE):
        figure, axes = _figure(_WIDTH_PT, _HEIGHT_PT + is_tall * 6 * max(map(len, groups)))
        titles = {}
        for index, row in enumerate(rows):
            color = _color(row.style_index, row.is_muted)
            x = [at + 0.5 * ((index + 0.5) / len(rows) - 0.5) for at in range(len(groups))]
            style = {"color": color, "markersize": 4, "linewidth": 1.0, "gid": f"points-{index}"}
            marker = _MARKERS[row.style_index // NUM_COLORS % len(_MARKERS)]
            axes.plot(x, row.values, marker=marker, linestyle="--" if row.is_muted else "-", **style)
            ends = zip(x, row.values, row.half_widths, strict=True)
            for at, value, width in ((at, value, width) for at, value, width in ends if math.isfinite(value + width)):
                axes.plot([at, at], [value - width, value + width], color=color, linewidth=1.2)
            titles[f"points-{index}"] = row.label
        axes.set_xticks(range(len(groups)), groups, rotation=90 if is_tall else 0)
        if level is not None:
            axes.axhline(level, color=_MUTED, linewidth=1, zorder=1)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_ylim(*_at_least(y_range or axes.get_ylim()))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", linewidth=0.7)
        return _inline(figure, name, description, titles)


def calibration_figure(lines: typing.Sequence[Line], name: str, description: str) -> str:
    """Draws observed rates over predicted probabilities, and the diagonal where both are equal, as an SVG element."""
    end = max((v for line in lines for v in (*line.x, *line.y) if math.isfinite(v)), default=1.0) * 1.05 or 1.0
    with matplotlib.rc_context(_FIGURE_STYLE):
        figure, axes = _figure(_WIDTH_PT, 300)
        axes.plot([0, end], [0, end], color=_MUTED, linewidth=1, zorder=1)
        for index, line in enumerate(lines):
            _draw(axes, line, f"line-{index}")
        axes.set_xlim(0, end)
        axes.set_ylim(0, end)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("observed rate")
        axes.grid(axis="both", linewidth=0.7)
        return _inline(figure, name, description, {f"line-{i}": line.label for i, line in enumerate(lines)})


def _at_least(limits: tuple[float, float]) -> tuple[float, float]:
    """Widens an axis to a part of its values: noise in the fourth digit must not look like a change."""
    low, high = sorted(limits)
    missing = MIN_SPAN * max(abs(low), abs(high)) - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


def _figure(width_pt: float, height_pt: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_pt / 72, height_pt / 72), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    for part in (figure, axes):
        part.patch.set_visible(False)
    return figure, axes


def _draw(axes: Axes, line: Line, gid: str) -> None:
    dash = [float(length) for length in style_dash(line.dash_index).split()]
    marker = _MARKERS[line.style_index // NUM_COLORS % len(_MARKERS)]
    color = _color(line.style_index, line.is_muted)
    num_points = sum(map(math.isfinite, line.y))
    is_sparse = num_points == 1 or (line.has_markers and num_points <= _MOST_MARKERS)  # a single point has no line
    axes.plot(
        line.x,
        line.y,
        gid=gid,
        color=color,
        linewidth=1.1 if line.is_muted else 1.5,
        linestyle=(0, dash) if dash else "-",
        marker=marker if is_sparse or line.style_index >= NUM_COLORS else None,
        markersize=3,
        markevery=None if is_sparse else max(1, len(line.x) // 8),
        zorder=2 if line.is_muted else 3,
    )
    ring = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x == line.ring_x and math.isfinite(y)]
    if ring:
        axes.plot(*ring[-1], "o", markersize=8, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.4)
    if line.is_stopped and num_points:
        last = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)][-1]
        axes.plot(*last, "x", markersize=7, markeredgecolor=color, markeredgewidth=1.6, zorder=4)


def _color(style_index: int, is_muted: bool = False) -> str:
    return _MUTED if is_muted else f"#0b01{style_color(style_index):02x}"


def _step_text(value: float, _position: int) -> str:
    """Writes 12k instead of 12000: five labels must fit on a phone."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _inline(figure: Figure, name: str, description: str, titles: dict[str, str]) -> str:
    """Turns the drawing into one <svg> whose ids no other figure has, with titles on its lines."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ET.fromstring(buffer.getvalue())
    for child in list(root):
        if child.tag.endswith("metadata"):
            root.remove(child)
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    text = ET.tostring(root, encoding="unicode")
    used = {i for i in ids if f"#{i}" in text}
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in titles:
            title = ET.Element(f"{{{_SVG}}}title")
            title.text = titles[own]
            element.insert(0, title)
        if own in used:
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            element.set(key, _own_reference(value, name))
        if element.tag == f"{{{_SVG}}}text":  # takes the page's font, keeps matplotlib's size and anchor
            element.set("style", re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", element.get("style", "")))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": description, "class": "figure"}
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    text = ET.tostring(root, encoding="unicode", short_empty_elements=True)
    # Marked as safe: the XML writer has escaped all text, and the template must not escape it again.
    return markupsafe.Markup(re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text))


def _own_reference(value: str, name: str) -> str:
    """Renames the target of url(#x) and #x like the ids."""
    if value.startswith("#"):
        return f"#{name}-{value[1:]}"
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)

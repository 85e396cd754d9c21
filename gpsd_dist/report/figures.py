"""Draws lines and dots with matplotlib as inline SVG. Knows nothing of runs.

Colours in the SVG are CSS variables of the page (`--c0` ... `--c7`, `--fig-text`, `--fig-grid`), so that one drawing
serves light and dark. Text stays text, in the page's font. Equal input gives equal bytes.
"""

import dataclasses
import io
import math
import re
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


@dataclasses.dataclass(frozen=True)
class Dots:
    """Describes one row of a strip chart: a value per seed; the mean is drawn as a bar across."""

    label: str
    values: tuple[float, ...]
    style_index: int


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
        if y_range is not None:
            axes.set_ylim(*y_range)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_TICK_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(_step_text))
        axes.yaxis.set_major_locator(MaxNLocator(4 if is_small else 5, steps=_TICK_STEPS))
        if max(map(abs, axes.get_ylim())) >= 10_000:
            axes.yaxis.set_major_formatter(FuncFormatter(_step_text))
        axes.grid(axis="y", linewidth=0.7)
        return _inline(figure, name, description, titles)


def strip_figure(rows: typing.Sequence[Dots], name: str, description: str, *, x_label: str) -> str:
    """Draws one row of dots per entry, top to bottom, as an SVG element."""
    with matplotlib.rc_context(_FIGURE_STYLE):
        figure, axes = _figure(_WIDTH_PT, 58 + 26 * len(rows))
        titles = {}
        for index, row in enumerate(rows):
            color, finite = _color(row.style_index), [value for value in row.values if math.isfinite(value)]
            marker = _MARKERS[row.style_index // NUM_COLORS % len(_MARKERS)]
            if finite:
                axes.plot(finite, [index] * len(finite), marker, color=color, markersize=5.5, gid=f"dots-{index}")
                mean = sum(finite) / len(finite)
                axes.plot([mean, mean], [index - 0.32, index + 0.32], color=color, linewidth=2.2)
                titles[f"dots-{index}"] = f"{row.label}: " + ", ".join(f"{value:.4f}" for value in finite)
        labels = [row.label if len(row.label) <= 24 else f"{row.label[:22]}.." for row in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=_TICK_STEPS))
        axes.margins(x=0.06)
        axes.set_xlabel(x_label)
        axes.grid(axis="both", linewidth=0.7)
        return _inline(figure, name, description, titles)


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
    color = _MUTED if line.is_muted else _color(line.style_index)
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


def _color(style_index: int) -> str:
    return f"#0b01{style_color(style_index):02x}"


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

"""Drawings: one SVG element each, in the page's colours, the same bytes for the same input."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from gpsd_dist.report.figures import NUM_COLORS, Dots, Line, line_figure, strip_figure

SVG = "{http://www.w3.org/2000/svg}"


def a_line(**changes):
    return Line(**({"label": "a", "x": (1.0, 2.0, 3.0, 4.0), "y": (1.0, 2.0, 1.5, 3.0)} | changes))


def draw(*lines, name="n", **options):
    return line_figure(lines, name, "what it shows", x_label="step", **options)


def path_of(svg: str, label: str) -> str:
    """The `d` of the first path of the line with that label."""
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None and title.text == label:
            return next(group.iter(f"{SVG}path")).get("d")
    raise AssertionError(f"no line {label!r}")


def num_marks(svg: str) -> int:
    """Markers on lines; ticks have no colour of a line."""
    return sum("var(--c" in use.get("style", "") for use in ET.fromstring(svg).iter(f"{SVG}use"))


def test_same_input_gives_the_same_bytes_and_nothing_of_today():
    assert draw(a_line()) == draw(a_line())
    assert not re.search(r"20\d\d-\d\d|metadata|matplotlib", draw(a_line()))


@pytest.mark.parametrize("svg", [draw(a_line()), strip_figure([Dots("a", (1.0, 2.0), 0)], "n", "d", x_label="AUC")])
def test_svg_is_one_element_without_anything_to_load(svg):
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.get("role") == "img" and root.get("aria-label")
    assert "viewBox" in root.attrib and not {"width", "height"} & set(root.attrib)
    references = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert all(value.startswith("#") for value in references)
    assert not svg.startswith("<?xml") and "<!DOCTYPE" not in svg and "ns0:" not in svg


def test_colours_follow_the_page():
    svg = draw(*(a_line(style_index=i) for i in range(NUM_COLORS)), zero_line=True)
    assert {f"var(--c{i})" for i in range(NUM_COLORS)} <= set(re.findall(r"var\(--[\w-]+\)", svg))
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
    for text in ET.fromstring(svg).iter(f"{SVG}text"):
        assert "var(--fig-text)" in text.get("style")


def test_ids_of_two_figures_never_meet_and_every_reference_has_its_target():
    ids = []
    for name in ("first", "second"):
        root = ET.fromstring(draw(a_line(has_markers=True, ring_x=2.0), name=name))
        own = [element.get("id") for element in root.iter() if element.get("id")]
        text = ET.tostring(root, encoding="unicode")
        assert set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)", text)) and all(i.startswith(name) for i in own)
        assert {a or b for a, b in re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)", text)} <= set(own)
        ids += own
    assert len(set(ids)) == len(ids)


def test_a_value_that_is_not_finite_breaks_the_line():
    whole = path_of(draw(a_line(label="x")), "x")
    broken = path_of(draw(a_line(label="x", y=(1.0, 2.0, math.nan, 3.0, 2.0), x=(1.0, 2.0, 3.0, 4.0, 5.0))), "x")
    assert whole.count("M") == 1 and broken.count("M") == 2


def test_a_line_of_one_point_is_seen():
    assert num_marks(draw(a_line(x=(5.0, 6.0), y=(0.5, math.nan)))) == 1
    assert num_marks(draw(a_line())) == 0 and num_marks(draw(a_line(has_markers=True))) == 4


def test_many_points_have_no_markers():
    x = tuple(float(i) for i in range(100))
    assert num_marks(draw(a_line(x=x, y=x, has_markers=True))) == 0


def test_names_are_escaped_and_shown_when_pointed_at():
    label = 'run <b onclick="x">&amp;'
    svg = draw(a_line(label=label))
    assert "<b" not in svg and path_of(svg, label)
    strip = strip_figure([Dots(label, (0.5, 0.7), 0)], "n", label, x_label="AUC")
    assert "<b" not in strip and ET.fromstring(strip).get("aria-label") == label


def test_dollars_are_no_formulas():
    svg = strip_figure([Dots("a$_x$b", (0.5,), 0)], "n", "d", x_label="cost in $ and $")
    words = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]
    assert {"a$_x$b", "cost in $ and $"} <= set(words)


def test_beyond_the_colours_markers_tell_lines_apart():
    first, again = (draw(a_line(style_index=i)) for i in (0, NUM_COLORS))
    assert "var(--c0)" in first and "var(--c0)" in again
    assert num_marks(first) == 0 < num_marks(again)


def test_scale_can_be_shared():
    low, high = (draw(a_line(y=(v,) * 4), y_range=(0.0, 1.0)) for v in (0.25, 0.75))
    labels = [[t.text for t in ET.fromstring(svg).iter(f"{SVG}text")] for svg in (low, high)]
    assert labels[0] == labels[1]
    heights = [float(re.findall(r"[ML] \S+ (\S+)", path_of(svg, "a"))[0]) for svg in (low, high)]
    assert heights[0] > heights[1]  # SVG counts from the top

"""Charts: what is drawn is well-formed, inside its frame, and a file that can't be written is refused beforehand."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fast_inference.protocol.errors import InvalidRequest
from fast_inference.simulator import plot
from fast_inference.simulator.plot import HEIGHT, WIDTH, Chart, Line, check_file, svg, write
from hypothesis import given
from hypothesis import strategies as st

values = st.just(0.0) | st.floats(1e-6, 1e6)
points = st.lists(st.tuples(values, values), max_size=8)


def drawing(lines: list[list[tuple[float, float]]], log_x: bool = False, log_y: bool = False) -> Chart:
    named = [Line(f"line <{number}>", found) for number, found in enumerate(lines)]
    return Chart(title="a & b", x_label="x", y_label="y", lines=named, log_x=log_x, log_y=log_y, markers=True)


@given(st.lists(points, max_size=3), st.booleans(), st.booleans())
def test_every_chart_is_well_formed_and_inside_its_frame(
    lines: list[list[tuple[float, float]]], log_x: bool, log_y: bool
) -> None:
    text = svg(drawing(lines, log_x, log_y))
    ElementTree.fromstring(text)
    for x, y in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', text):
        assert 0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT


def test_a_logarithmic_axis_leaves_out_what_it_can_not_show() -> None:
    text = svg(drawing([[(1.0, 0.0), (1.0, 10.0), (2.0, 1000.0)]], log_y=True))
    assert text.count("<circle") == 2
    assert ">100<" in text


def test_a_chart_is_written_as_svg(tmp_path: Path) -> None:
    check_file(tmp_path / "a.svg")
    write(drawing([[(0.0, 1.0), (2.0, 3.0)]]), tmp_path / "a.svg")
    assert "line &lt;0&gt;" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("name", "message"), [("a.pdf", "end in .svg or .png"), ("no/a.svg", "in a folder that exists")]
)
def test_a_file_that_can_not_be_drawn_is_refused_beforehand(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_file(tmp_path / name)


def test_png_needs_matplotlib_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="pip install matplotlib"):
        check_file(tmp_path / "a.png")

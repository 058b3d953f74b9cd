"""bench/timeline.py: the trace of a run as a picture."""

import importlib.util
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def timeline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("timeline", ROOT / "bench" / "timeline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["timeline"] = module
    spec.loader.exec_module(module)
    return module


TRACE = """[
{"name":"thread_name","ph":"M","pid":7,"tid":1,"args":{"name":"host"}},
{"name":"wake","ph":"X","pid":7,"tid":1,"ts":1000000.0,"dur":50000.0},
{"name":"thread_name","ph":"M","pid":7,"tid":2,"args":{"name":"guest"}},
{"name":"Settle","ph":"X","pid":7,"tid":2,"ts":1000.0,"dur":400000.0},
{"name":"outer","ph":"X","pid":7,"tid":2,"ts":1010000.0,"dur":30000.0},
{"name":"inner <&>","ph":"X","pid":7,"tid":2,"ts":1015000.0,"dur":10000.0},
{"name":"later","ph":"X","pid":7,"tid":2,"ts":1041000.0,"dur":5000.0},
"""


def test_trace_is_read_without_its_bracket_and_without_the_template(timeline: ModuleType) -> None:
    bars = timeline.read_trace(TRACE)
    assert [(bar.track, bar.name, bar.start_ms, bar.length_ms) for bar in bars] == [
        ("host", "wake", 0.0, 50.0),
        ("guest", "outer", 10.0, 30.0),
        ("guest", "inner <&>", 15.0, 10.0),
        ("guest", "later", 41.0, 5.0),
    ]


def test_spans_inside_each_other_get_rows_of_their_own(timeline: ModuleType) -> None:
    rows = {bar.name: row for row, bar in timeline.lay_out(timeline.read_trace(TRACE))}
    assert rows == {"wake": 0, "outer": 1, "inner <&>": 2, "later": 1}


def test_picture_is_xml_with_every_span_on_the_one_scale(timeline: ModuleType) -> None:
    picture = ET.fromstring(timeline.draw(timeline.read_trace(TRACE), "a <run>"))
    boxes = {
        (title.text or ""): box
        for box in picture.iter("{http://www.w3.org/2000/svg}rect")
        for title in box.iter("{http://www.w3.org/2000/svg}title")
    }
    assert set(boxes) == {"wake 50 ms", "outer 30 ms", "inner <&> 10 ms", "later 5 ms"}
    widths = {name: float(box.attrib["width"]) for name, box in boxes.items()}
    assert widths["wake 50 ms"] == pytest.approx(5 * widths["inner <&> 10 ms"], rel=0.01)


def test_what_is_no_trace_is_refused(
    timeline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    for text in ("", "[\n", "hello"):
        bad.write_text(text)
        monkeypatch.setattr(sys, "argv", ["timeline.py", str(bad), str(tmp_path / "out.svg")])
        assert timeline.main() == 1
        assert "cannot draw" in capsys.readouterr().err
    assert not (tmp_path / "out.svg").exists()

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from attnres_train.__main__ import main
from attnres_train.config import load_config
from attnres_train.config.shipped import names
from attnres_train.config.stages import stage_configs
from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.parts import MODES
from attnres_train.pipeline.plan.schedule import one_f_one_b
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.planning.machine import Machine
from attnres_train.planning.planner import Planner
from attnres_train.planning.shapes import Box, Line, Picture
from attnres_train.planning.timeline import draw_timeline

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def plan() -> TransportPlan:
    return TransportPlan(make_layout(8, 3, 2, 2))


def timeline_of(plan: TransportPlan, mode: str, unit: float = 0.1, micro_batches: int = 4):
    costs = Costs([1.0] * 4, [2.0] * 4, unit)
    return simulate(plan, one_f_one_b(2, 2, micro_batches), costs, mode)


def draw(plan: TransportPlan, mode: str, **settings):
    timeline = timeline_of(plan, mode, **settings)
    return timeline, ElementTree.fromstring(draw_timeline(plan, timeline, mode).svg())


def rects(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [r for r in root.findall(f"{SVG}rect") if kind in (r.get("class") or "").split()]


def boxes(picture: Picture, kind: str) -> list[Box]:
    return [shape for shape in picture.shapes if isinstance(shape, Box) and shape.kind == kind]


@pytest.mark.parametrize("mode", MODES)
def test_every_pass_and_transfer_is_drawn_inside_the_picture(plan, mode):
    timeline, root = draw(plan, mode)
    assert len(rects(root, "pass")) == len(timeline.passes) == 2 * 4 * 4
    assert len(rects(root, "wire")) == len(timeline.transfers) > 0
    for rect in rects(root, "pass") + rects(root, "wire"):
        x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        assert x >= 0 and x + width <= float(root.get("width"))
        assert y >= 0 and y + height <= float(root.get("height"))


def test_hovering_names_what_is_sent(plan):
    _, root = draw(plan, "eager")
    hints = [title.text for title in root.iter(f"{SVG}title")]
    assert "F(chunk 0, micro-batch 0) on rank 0: 0 ms + 1 s" in hints
    first = [hint for hint in hints if "for F(chunk 1, micro-batch 0)" in hint]
    assert all(hint.startswith("rank 0 to 1: 1 units for") for hint in first[:2])
    assert "(block 0)" in first[0] and "(block 1)" in first[1] and "(the partial)" in first[2]
    assert any("(gradients of block 0" in hint for hint in hints)


def test_the_stored_blocks_are_drawn_to_their_peak(plan):
    _, root = draw(plan, "exact")
    paths = root.findall(f"{SVG}path")
    hints = [path.find(f"{SVG}title").text for path in paths]
    assert len(paths) == 2 and hints[0].startswith("rank 0 stores at most ")
    legend = [text.text for text in root.iter(f"{SVG}text")]
    peak = max(int(hint.split()[-2]) for hint in hints)
    assert f"blocks stored (full height: {peak})" in legend


def test_idle_time_is_told_of_the_step_and_of_each_rank(plan):
    timeline, root = draw(plan, "exact")
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[0].endswith(f"idle {timeline.bubble:.1%}")
    for seconds in timeline.compute_seconds:
        assert f"idle {1 - seconds / timeline.seconds:.1%}" in texts


def test_one_rank_sends_nothing():
    plan = TransportPlan(make_layout(2, 2, 1, 1))
    timeline = simulate(plan, one_f_one_b(1, 1, 2), Costs([1.0], [2.0], 1.0), "eager")
    root = ElementTree.fromstring(draw_timeline(plan, timeline, "eager").svg())
    assert not rects(root, "wire") and len(rects(root, "pass")) == 4


def test_a_long_step_is_shown_in_parts_with_marked_breaks(plan):
    timeline = timeline_of(plan, "eager", micro_batches=400)
    picture = draw_timeline(plan, timeline, "eager")
    breaks = [s for s in picture.shapes if isinstance(s, Line) and s.kind == "break"]
    assert len(breaks) == 2 * 2 * 2  # breaks x strokes x ranks
    passes = boxes(picture, "pass")
    assert passes[0].hint.startswith("F(chunk 0, micro-batch 0)")
    assert "micro-batch 399" in passes[-1].hint
    assert 100 < len(passes) < 400 < len(timeline.passes)
    told = [shape.text for shape in picture.shapes if getattr(shape, "text", "")[-8:] == "left out"]
    assert len(told) == 2


def test_thin_transfers_are_drawn_as_one_and_nothing_thin_has_an_edge(plan):
    timeline = timeline_of(plan, "eager", unit=0.001)
    picture = draw_timeline(plan, timeline, "eager")
    wires = boxes(picture, "wire")
    assert 0 < len(wires) < len(timeline.transfers)
    assert any("transfers" in wire.hint for wire in wires)
    units = sum(transfer.part.units for transfer in timeline.transfers)
    said = [wire.hint.split(" units")[0].split()[-1] for wire in wires]
    assert sum(map(int, said)) == units
    assert not any(box.edged for box in boxes(picture, "pass") if box.width < 2)


def test_the_picture_of_the_readme_is_what_its_command_draws(tmp_path, capsys):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    target = "docs/pictures/plan.svg"
    (line,) = [line for line in page.splitlines() if f"--picture {target}" in line]
    words = line.replace(target, str(tmp_path / "plan.svg")).split()
    config = [str(ROOT / word) if word.startswith("configs/") else word for word in words[1:]]
    assert main(config) == 0
    assert (tmp_path / "plan.svg").read_text() == (ROOT / target).read_text()
    assert f"({target})" in page


@pytest.mark.nightly
@pytest.mark.parametrize("name", names())
def test_no_picture_of_a_config_of_ours_takes_a_megabyte(name):
    for config in stage_configs(load_config(name)):
        picture = Planner(config, Machine()).picture("eager")
        assert len(picture.svg()) < 1e6
        assert {shape.kind for shape in picture.shapes if isinstance(shape, Box)} > {"pass", "idle"}


class TestFiles:
    def test_png(self, plan, tmp_path):
        pytest.importorskip("matplotlib")
        picture = draw_timeline(plan, timeline_of(plan, "eager"), "eager")
        picture.write(tmp_path / "a.png", "--picture")
        assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--picture", "a.pdf"], "ends in .svg or .png"),
            (["--picture", "nowhere/a.svg"], "--picture nowhere/a.svg: No such file"),
            (["--window", "0:1s"], "add --picture"),
            (["--picture", "a.svg", "--window", "5"], "--window 5: write A:B"),
        ],
    )
    def test_what_cannot_be_drawn(self, words, says, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert main(["plan", "quickstart", *words]) == 2
        assert says in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

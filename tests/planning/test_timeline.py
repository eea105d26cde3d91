from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.parts import MODES
from attnres_train.pipeline.plan.schedule import one_f_one_b
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.planning.timeline import draw_timeline

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def plan() -> TransportPlan:
    return TransportPlan(make_layout(8, 3, 2, 2))


def draw(plan: TransportPlan, mode: str, unit: float = 0.1):
    costs = Costs([1.0] * 4, [2.0] * 4, unit)
    timeline = simulate(plan, one_f_one_b(2, 2, 4), costs, mode)
    return timeline, ElementTree.fromstring(draw_timeline(plan, timeline, mode))


@pytest.mark.parametrize("mode", MODES)
def test_every_pass_and_transfer_is_drawn_inside_the_picture(plan, mode):
    timeline, root = draw(plan, mode)
    rects = {kind: root.findall(f"{SVG}rect[@class='{kind}']") for kind in ("pass", "wire")}
    assert len(rects["pass"]) == len(timeline.passes) == 2 * 4 * 4
    assert len(rects["wire"]) == len(timeline.transfers) > 0
    for rect in rects["pass"] + rects["wire"]:
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


def test_one_rank_sends_nothing():
    plan = TransportPlan(make_layout(2, 2, 1, 1))
    timeline = simulate(plan, one_f_one_b(1, 1, 2), Costs([1.0], [2.0], 1.0), "eager")
    root = ElementTree.fromstring(draw_timeline(plan, timeline, "eager"))
    assert not root.findall(f"{SVG}rect[@class='wire']")
    assert len(root.findall(f"{SVG}rect[@class='pass']")) == 4

"""`attnres-train options`, and the page that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.__main__ import main
from attnres_train.config.fields import all_keys, holds_sections

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["options", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_the_page_is_in_step(capsys):
    assert PAGE.read_text("utf-8") == shown(capsys, "--markdown"), (
        "docs/options.md is not what the schema says; write it anew: "
        ".venv/bin/attnres-train options --markdown > docs/options.md"
    )


def test_the_page_has_every_key_and_its_links_lead_to_headings():
    text, lists = PAGE.read_text("utf-8"), ("data.corpus.", "log.observers.", "stages.")
    for key in all_keys():
        if not holds_sections(key) and not key.startswith(lists):
            assert f"- **`{key}`** · " in text
    assert "- **`data.corpus[].weight`** · number above 0 · default `1.0`\\\n" in text
    assert "- **`stages[].train.seq_length`** · " in text
    headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("##")]
    anchors = {heading.lower().replace(".", "").replace(" ", "-") for heading in headings}
    for heading in headings[:-1]:
        assert f"[{heading}](#{heading.replace('.', '')})" in text
        assert heading.replace(".", "") in anchors


def test_all_are_printed_by_section(capsys):
    text = shown(capsys)
    assert "== train: Batch, length and precision of training.\ntrain.train_iters\n" in text
    assert text.index("== run:") < text.index("== model.moe:") < text.index("== log.wandb:")


def test_a_hit_is_wrapped_to_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    lines = shown(capsys, "reset_at_documents").splitlines()
    assert lines[:2] == ["data.reset_at_documents", "    true or false; default false"]
    assert len(lines) > 6
    assert all(len(line) <= 50 for line in lines)
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, shown(capsys, "reset_at_documents").splitlines())) <= 100


def test_a_kind_is_shown_with_ours_and_the_way_to_ones_own(capsys):
    lines = [line.strip() for line in shown(capsys, "data.corpus.kind").splitlines()]
    assert lines[:2] == ["data.corpus[].kind", "kind; required"]
    assert any(line.startswith("jsonl: ") for line in lines)
    assert "module:Name of your own (docs/extending.md)" in lines


def test_nothing_found(capsys):
    assert "nearest: train.train_iters" in shown(capsys, "trian_iters", code=1)
    assert "nearest: optimizer.lr" in shown(capsys, "learnig_rate", code=1)
    assert "`attnres-train options` prints all" in shown(capsys, "qqqq", "zzzz", code=1)


def test_the_page_is_not_searched(capsys):
    assert "leave the words out" in shown(capsys, "--markdown", "lr", code=2)

"""docs/inputs.md names, for every input, a test that shows what it does: each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py::[\w:]+)`", PAGE)))


@pytest.mark.parametrize("name", NAMED)
def test_it_is_there(name: str) -> None:
    file, *names = name.split("::")
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for wanted in names:
        found = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == wanted
        ]
        assert found, f"{file} has no {wanted}"
        body = found[0].body


def test_every_row_has_one() -> None:
    rows = [row for row in ROWS if not row.startswith("| input ")]
    assert len(rows) > 40
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::[\w:]+` \|$|`tests/[\w/]+\.py::[\w:]+`,? ?\|?$", row)
        assert len(re.findall(r"(?<!\\)\|", row)) == 4, row

"""Without lm-eval the command says what to install."""

from __future__ import annotations

import sys

from attnres_train.__main__ import main


def test_without_the_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["harness", "run", "--tasks", "arc_easy"]) == 2
    assert "harness needs lm-eval" in capsys.readouterr().err

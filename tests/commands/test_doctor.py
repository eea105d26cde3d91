"""What the machine has."""

from __future__ import annotations

from importlib.metadata import version

from attnres_train.__main__ import main
from attnres_train.commands.doctor import OPTIONAL, REQUIRED


def test_the_doctor_names_every_package_and_what_a_lack_costs(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for package in REQUIRED:
        (line,) = [text for text in lines if text.split()[:1] == [package]]
        assert "MISSING" not in line
    assert f"  {'torch':<20} {version('torch')}" in lines
    for package, (use, without) in OPTIONAL.items():
        (line,) = [text for text in lines if text.split()[:1] == [package]]
        assert use in line
        assert without in line or "not installed" not in line

"""Interpreters with packages that the tests' own does not need."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def interpreter_with(folder: Path, **needed: str) -> str:
    """An interpreter that has the modules ``needed`` (module=requirement): this one, or that of an
    environment made in ``folder``, which has the packages of this one too. Skips the test where
    they cannot be installed."""
    if all(map(importlib.util.find_spec, needed)):
        return sys.executable
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = str(folder / "bin" / "python")
    pip = [found, "-m", "pip", "install", "--quiet", *needed.values()]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"{' '.join(needed.values())} cannot be installed: {result.stderr[-300:]}")
    return found

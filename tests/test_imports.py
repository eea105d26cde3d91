"""Who may import whom, read from the source, and how much a bare import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attnres_train

PACKAGE = Path(attnres_train.__file__).parent
PLANNING = "pipeline.plan"
"""The room that is pure Python: it knows block arithmetic, and neither torch nor the model."""
# Room -> what it may import of ours, besides itself, `errors`, `screen` and `words`. Those not
# named are on top.
ALLOWED = {
    "errors": (),
    "loading": (),
    "megatron": ("loading",),
    "screen": (),
    "words": (),
    "command_line": ("__version__", "config.meant", "planning.machine"),
    "config": (),
    "model": ("config",),
    "pipeline.plan": ("config.kinds", "model.blocks"),
    "pipeline.run": ("pipeline.plan",),
    "parallel": ("config", "megatron", "model"),
    "optim": ("config", "model.parameters", "model.parts"),
    "data": ("config", "megatron"),
    "checkpoint": ("config", "model.parts"),
    "inference": (
        "checkpoint",
        "config",
        "data",
        "model",
        "parallel",
        "pipeline",
        "planning.build",
    ),
    "evaluation": ("config", "data", "inference", "model", "parallel.launched"),
    "observe": ("config", "model.naming"),
    "planning": ("config", "model", "optim", "parallel.ownership", "pipeline.plan"),
    "corpus": ("supervise.run_lock",),
    "study": (
        "config",
        "model.flops",
        "observe",
        "planning",
        "checkpoint.folders",
        "reports.chart",
        "reports.curves",
        "reports.document",
        "supervise",
    ),
    "supervise": ("config", "pipeline.run.waits"),
    "reports": ("__version__", "checkpoint", "config", "observe", "planning", "supervise.run_lock"),
    "runs": ("checkpoint", "config", "data", "parallel", "supervise.preflight"),
}
TOP = ("commands", "extend", "train", "__main__")
OPTIONAL = {"transformer_engine", "apex", "fused_weight_gradient_mlp_cuda", "fla", "wandb"}


def modules() -> dict[str, Path]:
    """Module name below the package -> its file."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(p for p in parts if p != "__init__") or "__init__"] = path
    return names


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Every module that ``path`` imports, absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    prefix = "attnres_train."
    return {name.removeprefix(prefix) for name in imports_of(path) if name.startswith(prefix)}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("module", sorted(modules()))
def test_import_direction(module: str) -> None:
    imported = ours(modules()[module])
    room = next((room for room in ALLOWED if within(module, room)), module.split(".")[0])
    if room in ALLOWED:
        allowed = (*ALLOWED[room], room, "errors", "screen", "words")
        wrong = {name for name in imported if not any(within(name, a) for a in allowed)}
        assert not wrong, f"{module} may not import {sorted(wrong)}"
    if not any(within(module, top) for top in TOP):
        wrong = {name for name in imported if any(within(name, top) for top in TOP)}
        # The command line and the launcher start what lies above them by name, lazily.
        assert not wrong, f"{module} may not import {sorted(wrong)}: nobody imports {TOP}"


def test_no_modules_import_each_other() -> None:
    """Nor in a circle, nor for types alone: each can be read after those that it imports."""
    known = modules()

    def home(name: str) -> str | None:
        """The module that ``name``, of a module or of something in one, stands for."""
        places = (name, name.rpartition(".")[0])
        return next((place for place in places if place in known), None)

    waiting = {name: {home(n) for n in ours(path)} - {None, name} for name, path in known.items()}
    while free := [name for name, imported in waiting.items() if not imported & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"in or above a circle: {sorted(waiting)}"


@pytest.mark.parametrize("module", [name for name in sorted(modules()) if within(name, PLANNING)])
def test_planning_is_pure_python(module: str) -> None:
    imported = imports_of(modules()[module])
    assert not {name for name in imported if within(name, "torch")}
    wrong = {n for n in ours(modules()[module]) if within(n, "model")} - {"model.blocks.Blocks"}
    assert not wrong


@pytest.mark.parametrize("module", sorted(modules()))
def test_heavy_and_optional_packages_are_lazy(module: str) -> None:
    top = imports_of(modules()[module], top_level_only=True)
    heavy = {name for name in top if within(name, "megatron") or name.split(".")[0] in OPTIONAL}
    assert not heavy, f"{module} imports {sorted(heavy)} at import time"


def test_bare_imports_load_no_torch() -> None:
    planning = [name for name in modules() if within(name, PLANNING)]
    kinds = [".model.residual.kinds", ".model.parameters", ".optim.kinds"]
    names = ["", ".config", ".model.blocks", *kinds, *(f".{name}" for name in planning)]
    code = "".join(f"import attnres_train{name}\n" for name in names)
    code += "import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_loads_nothing_heavy() -> None:
    """Nor does that of a command, each of which has a file in `commands`."""
    names = {path.stem.strip("_") for path in (PACKAGE / "commands").glob("*.py")}
    commands = sorted(names - {"init", "output", "spread"})
    assert {"train", "config", "options"} <= set(commands)
    code = (
        "import sys; from attnres_train.__main__ import main\n"
        f"for words in [[], *([name] for name in {commands})]:\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0, words\n"
        "sys.exit(bool({'torch', 'yaml', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What a run folder keeps of its run beside checkpoints and metrics, and what becomes of an earlier
run's things there when another one begins.

history/step_00000060.yaml  the configuration with which the steps after 60 were made
history/step_00000060.json  what became of the data at step 60, if anything
tokenizer/                  the tokenizer's file
files/<digest>.jsonl.gz     the files of a corpus: name, bytes, hash of some blocks
data.json                   what the tokens depend on (`identity.data_record`)
origin.json                 where the run began, if `checkpoint.resume` said so (`config.origin`)
before-1/                   an earlier run that `checkpoint.resume` made way for
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnres_train.checkpoint.folders import find_latest, scan, step_name
from attnres_train.config.loader import as_yaml
from attnres_train.config.origin import FILE, Origin, as_asked, has_begun, write_origin
from attnres_train.config.schema import RunConfig
from attnres_train.data.corpora.content import digest_of
from attnres_train.data.corpora.reader import FileRow
from attnres_train.errors import UserError
from attnres_train.screen import say

# All that a run of ours leaves; the user's own files stay where they are. Checkpoints go last: with
# them gone, nothing of the run is left to be taken for the next one's.
_LEFT_BY_A_RUN = (
    "config.yaml",
    "info.json",
    "environment.json",
    "starts.jsonl",
    "data.json",
    "tokenizer",
    "files",
    "history",
    "loss.png",
    "tensorboard",
    "wandb",
    "wandb_id",
    "metrics.jsonl",
    "samples.jsonl",
    FILE,
    "checkpoints",
)
_UNTIL = re.compile(r"\.until-step_\d+")
# What a run that goes back to a checkpoint of its own keeps, up to the step of that.
_GOES_ON = ("metrics.jsonl", "samples.jsonl", "history", "starts.jsonl", "tokenizer", "files")


def begin(folder: Path, resume: str, loaded: Path | None) -> Path | None:
    """Make run folder ``folder`` that of the run which has just loaded ``loaded`` (None: nothing)
    as ``checkpoint.resume=resume`` says. An earlier run there, of another beginning, is moved aside
    and told of. Returns where ``loaded`` lies now.

    Raises UserError where it cannot be moved.
    """
    checkpoints = folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    if resume == "auto":
        if loaded is None:
            write_origin(folder, None)
        return loaded
    if has_begun(folder, resume):
        return loaded
    goes_on = loaded is not None and _same(loaded, find_latest(checkpoints))
    if not goes_on and (scan(checkpoints) or (folder / "metrics.jsonl").exists()):
        own = loaded is not None and _same(loaded.parent, checkpoints)
        aside = _move_aside(folder)
        say(f"checkpoint.resume={resume}: the run that was in {folder} is in {aside} now")
        if loaded is not None and own:
            loaded = aside / "checkpoints" / loaded.name
            _copy(aside, folder)
    where = str(loaded.absolute()) if loaded else None
    write_origin(folder, Origin(as_asked(resume), where))
    return loaded


def _same(path: Path, other: Path | None) -> bool:
    return other is not None and path.resolve() == other.resolve()


def _move_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder / f"before-{number}").exists():
        number += 1
    try:
        aside.mkdir()
        for name in _LEFT_BY_A_RUN:
            if (folder / name).exists():
                (folder / name).rename(aside / name)
    except OSError as error:
        raise UserError(
            f"run.name: the run in {folder} cannot be moved aside ({error}): choose another "
            "run.name"
        ) from error
    return aside


def _copy(aside: Path, folder: Path) -> None:
    for name in _GOES_ON:
        source = aside / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.exists():
            shutil.copy2(source, folder / name)


def keep_identity(
    folder: Path,
    step: int,
    config: RunConfig,
    record: Mapping[str, Any],
    tokenizer: str | None,
    data_history: Sequence[str] = (),
) -> None:
    """Write down what the steps after ``step`` are made with: ``config``, the data of ``record``
    and the file ``tokenizer``; and what has become of the data there. What was written for later
    steps, which are gone, goes too."""
    history = folder / "history"
    history.mkdir(parents=True, exist_ok=True)
    entries = sorted(history.glob("step_*.yaml"))
    if step and not entries and (folder / "config.yaml").exists():  # of before there was a history
        entries = [Path(shutil.copy2(folder / "config.yaml", history / f"{step_name(0)}.yaml"))]
    for entry in [entry for entry in entries if _step_of(entry) >= step]:
        entry.unlink()
        entries.remove(entry)
    for told in history.glob("step_*.json"):
        if _step_of(told) >= step:
            told.unlink()
    if data_history:
        told = history / f"{step_name(step)}.json"
        told.write_text(json.dumps({"data": list(data_history)}) + "\n", encoding="utf-8")
    text = as_yaml(config)
    if not entries or entries[-1].read_text(encoding="utf-8") != text:
        (history / f"{step_name(step)}.yaml").write_text(text, encoding="utf-8")
    (folder / "data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        _keep_tokenizer(folder / "tokenizer", step, Path(tokenizer))


def keep_files(folder: Path, lists: Mapping[str, Sequence[Sequence[object]]]) -> None:
    """Keep ``lists`` of files by their digests, a line of JSON for each file."""
    for digest, rows in lists.items():
        path = folder / "files" / f"{digest}.jsonl.gz"
        if read_files(folder, digest) is None:  # or damaged
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_bytes(gzip.compress(text.encode(), mtime=0))
            partial.replace(path)


def read_files(folder: Path, digest: str) -> list[FileRow] | None:
    """The list of files with ``digest``; None where it is not there, or damaged."""
    try:
        text = gzip.decompress((folder / "files" / f"{digest}.jsonl.gz").read_bytes())
        rows = [FileRow(*json.loads(line)) for line in text.splitlines()]
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        return None
    return rows if digest_of(rows) == digest else None


def _step_of(entry: Path) -> int:
    return int(entry.stem.removeprefix("step_"))


def _keep_tokenizer(folder: Path, step: int, file: Path) -> None:
    """A file that was another one until ``step`` is kept too, under a name that says so."""
    folder.mkdir(exist_ok=True)
    # Of a run that goes back to before another was taken, it is one that was kept so.
    content, kept = file.read_bytes(), folder / _UNTIL.sub("", file.name)
    if kept.exists() and kept.read_bytes() == content:
        return
    for other in list(folder.iterdir()):
        if ".until-" not in other.name and other.suffix != ".partial":
            other.rename(other.with_name(f"{other.stem}.until-{step_name(step)}{other.suffix}"))
    partial = folder / f"{kept.name}.partial"
    partial.write_bytes(content)
    partial.replace(kept)

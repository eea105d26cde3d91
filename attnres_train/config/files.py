"""Whether the files that a configuration names are there. What they hold is checked where it is
read."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator
from pathlib import Path

from attnres_train.config.schema import CorpusConfig, RunConfig


def file_problems(config: RunConfig) -> Iterator[str]:
    """What is missing among corpora, tokenizer and the checkpoint to resume from."""
    for i, corpus in enumerate(config.data.corpus):
        if corpus.kind != "python-stdlib":
            yield from _corpus(f"data.corpus.{i}.path", corpus)
    tokenizer = config.data.tokenizer
    if tokenizer.kind in ("file", "tiktoken"):
        yield from _tokenizer(tokenizer.kind, tokenizer.path)
    if config.checkpoint.resume not in ("auto", "never"):
        yield from _checkpoint(Path(config.checkpoint.resume).expanduser())


def _corpus(key: str, corpus: CorpusConfig) -> Iterator[str]:
    paths = [corpus.path] if isinstance(corpus.path, str) else corpus.path
    if not paths:
        yield f"{key} is missing: a corpus of kind {corpus.kind} needs one"
    for path in paths or []:
        if corpus.kind == "indexed":
            yield from _indexed(key, path)
        elif Path(path).is_dir():
            if not any(file.is_file() for file in Path(path).rglob("*")):
                yield f"{key}: the folder {path} holds no file"
        elif not (Path(path).exists() or glob.glob(path, recursive=True)):
            yield f"{key}: there is no file {path}{_beside(Path(path))}"


def _indexed(key: str, prefix: str) -> Iterator[str]:
    missing = [prefix + end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]
    if missing and prefix.endswith((".bin", ".idx")):
        yield f"{key} is {prefix}: name the pair by its prefix, {prefix[:-4]}"
    elif missing:
        yield f"{key}: there is no {' and no '.join(missing)}{_beside(Path(missing[0]))}"


def _tokenizer(kind: str, path: str | None) -> Iterator[str]:
    key = "data.tokenizer.path"
    if path is None:
        yield f"{key} is missing: a tokenizer of kind {kind} needs one"
    elif not Path(path).is_file():
        yield f"{key}: there is no file {path}{_beside(Path(path))}"


def _checkpoint(path: Path) -> Iterator[str]:
    """``path`` is a checkpoint, a folder of checkpoints or a run folder with ``checkpoints/``."""
    key = "checkpoint.resume"
    if not path.is_dir():
        yield f"{key}: there is no folder {path}{_beside(path)}"
    elif not any(any(path.glob(trace)) for trace in ("meta.json", "step_*", "checkpoints/step_*")):
        yield f"{key}: there is no checkpoint (step_*) in {path}{_beside(path)}"


def _beside(path: Path) -> str:
    """What ``path`` or the nearest existing folder above it holds, names most like it first."""
    folder = next(folder for folder in (path, *path.parents) if folder.is_dir())
    wanted = str(path.relative_to(folder))
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    names.sort(key=lambda name: -difflib.SequenceMatcher(None, name, wanted).ratio())
    more = ", ..." if len(names) > 6 else ""
    return f"; {folder.absolute()} holds {', '.join(names[:6]) or 'nothing'}{more}"

"""The tokenizer that a checkpoint's tokens are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attnres_train.config.schema import RunConfig
from attnres_train.data.tokenizers.kind import TokenizerKind, tokenizer_kind, too_many_tokens
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError


def saved_tokenizer(
    config: RunConfig, extras: Mapping[str, Any], step_folder: Path
) -> Tokenizer | None:
    """The tokenizer of the run whose checkpoint ``step_folder`` holds ``extras`` beside tensors;
    None for a run on tokens alone.

    The run folder keeps its file; else it is where the configuration says. A checkpoint that was
    imported names the configuration's alone. Raises UserError where it is not there, or another.
    """
    settings = config.data.tokenizer
    kind = tokenizer_kind(settings)
    if not kind.encodes_text:
        return None
    record = extras.get("data", {}).get("tokenizer", {})
    path = None
    if kind.needs_path or kind.trains_on_corpora:
        path = _file(kind, record.get("sha256"), step_folder)
    if record.get("eod") is not None:
        settings = settings.model_copy(update={"eod": record["eod"]})
    tokenizer = Tokenizer(path, settings)
    if tokenizer.vocab_size > config.model.vocab_size:
        told = f"{tokenizer.source} has a vocabulary of"
        raise UserError(too_many_tokens(told, tokenizer.vocab_size, config.model.vocab_size))
    return tokenizer


def _file(kind: TokenizerKind, sha256: str | None, step_folder: Path) -> Path:
    found = list(_files(kind, step_folder))
    if not found:
        kept = step_folder.absolute().parent.parent / "tokenizer"
        named = f", nor in {kind.key}.path {kind.section.path}" if kind.section.path else ""
        raise UserError(
            f"the tokenizer of {step_folder} is missing: there is no file in {kept}{named}"
        )
    if sha256 is None:  # imported: nothing has been trained yet
        return found[0]
    for file in found:
        if hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
            return file
    raise UserError(
        f"{step_folder} was trained with another tokenizer than {' and '.join(map(str, found))}: "
        f"its file has the SHA-256 {sha256}"
    )


def _files(kind: TokenizerKind, step_folder: Path) -> Iterator[Path]:
    """Those kept in the run folder, the present one first, and the one that is configured."""
    kept = step_folder.absolute().parent.parent / "tokenizer"
    files = [path for path in kept.glob("*") if path.is_file() and path.suffix != ".partial"]
    yield from sorted(files, key=lambda path: (".until-" in path.name, path.name))
    if kind.section.path is not None:
        configured = kind.file(Path(kind.section.path))
        if configured.is_file():
            yield configured

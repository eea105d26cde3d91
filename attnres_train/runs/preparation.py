"""The data of a run as it stands: one that goes on uses the tokenizer it has, and knows its files.

Whoever prepares data for a run asks here: the launcher, the first worker of every machine,
`attnres-train data`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnres_train.config.loader import plain_values
from attnres_train.config.resume_table import Change, Effect, changes
from attnres_train.config.saved import upgraded
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import called, stage_configs
from attnres_train.data.blend import taken
from attnres_train.data.corpora.content import digest_of
from attnres_train.data.corpora.reader import CorpusReader, FileRow, find_corpora
from attnres_train.data.generations import Generation, Match, Part, RunData, match, parts
from attnres_train.data.prepare import Prepared, prepare
from attnres_train.data.record import as_record, from_record
from attnres_train.errors import UserError
from attnres_train.runs import identity, run_folder
from attnres_train.runs.stages import problems_named
from attnres_train.runs.standing import Standing, standing
from attnres_train.screen import complain

Lists = Mapping[str, Sequence[FileRow]]
"""Lists of files by their digest."""


@dataclass(frozen=True)
class Preparation:
    """What was prepared, and the files it was prepared from."""

    record: Mapping[str, Any]
    """Where it lies on this machine, with its files (`data.record`)."""
    files: Lists
    stage: int = 0
    """Number of the stage that it is for."""

    @property
    def prepared(self) -> Prepared:
        return from_record(self.record)


def hand_over(made: Sequence[Preparation], path: Path) -> None:
    """Write into ``path`` what `handed_over` reads. Raises UserError where that cannot be."""
    try:
        path.write_text(json.dumps([asdict(one) for one in made]), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}, for the workers, cannot be written ({error.strerror}): make room there, "
            "or have TMPDIR name another folder"
        ) from error


def handed_over(path: Path) -> list[Preparation]:
    """What another process on this machine has prepared a moment ago (`hand_over`): it is not
    looked at again."""
    return [Preparation(**one) for one in json.loads(path.read_text(encoding="utf-8"))]


def prepare_stages(config: RunConfig, *, progress: bool = True) -> list[Preparation]:
    """`prepare_run` and, for each stage that comes after it, the same: those that are over need no
    data. All have the tokenizer of the first. Raises UserError as `prepare_run`."""
    first = prepare_run(config, progress=progress)
    trained = first.prepared.tokenizer_path
    tokenizer, made = Path(trained) if trained else None, [first]
    for number, stage in enumerate(stage_configs(config)[first.stage + 1 :], first.stage + 1):
        if progress:
            complain(f"data: for {called(config, number)}:")
        with problems_named(config, number):
            run = RunData([[Part(0, reader)] for reader in find_corpora(stage.data)], tokenizer)
            made.append(_prepare(stage, run, progress, number))
    return made


def prepare_run(config: RunConfig, *, progress: bool = True) -> Preparation:
    """`prepare` for the run of ``config`` as it stands on disk, for the stage that it goes on with.

    Raises UserError as `standing` and `prepare` do, and, before anything is tokenised, where the
    run has read other files than there are now and nothing says what is meant.
    """
    found = standing(config)
    number = found.stage if found else 0
    stage = stage_configs(config)[number]
    with problems_named(config, number):
        if found is not None:
            identity.compare(stage, found.path, found.extras, None, goes_on=not found.is_new)
        readers = find_corpora(stage.data)
        run = RunData([[Part(0, reader)] for reader in readers])
        if found is not None:
            run = RunData(_corpora(stage, found, readers), _tokenizer(stage, found))
        return _prepare(stage, run, progress, number)


def _prepare(config: RunConfig, run: RunData, progress: bool, number: int) -> Preparation:
    prepared = prepare(config, progress=progress, run=run)
    corpora = [part.reader for generations in run.corpora for part in generations]
    seen = {file: content for one in corpora for file, content in one.contents.items()}
    files = {digest_of(one.rows): one.rows for one in corpora}
    return Preparation(as_record(prepared, seen), files, number)


def _tokenizer(config: RunConfig, found: Standing) -> Path | None:
    """The file in the run folder of ``found`` with which the run has been tokenised; None where
    none is there, or another tokenizer is asked for."""
    if "data" not in found.extras or _asks_for_another(config, found):
        return None
    wanted = found.extras["data"]["tokenizer"]["sha256"]
    files = sorted((_folder(found) / "tokenizer").glob("*"))
    same = (f for f in files if hashlib.sha256(f.read_bytes()).hexdigest() == wanted)
    return next(same, None)


def _folder(found: Standing) -> Path:
    """The run folder in which the checkpoint lies."""
    return found.path.resolve().parent.parent


def _asks_for_another(config: RunConfig, found: Standing) -> bool:
    before = upgraded(found.extras.get("config", {}))
    now = plain_values(config)
    return any(change.effect == Effect.TOKENIZER for change in changes(before, now))


def _corpora(
    config: RunConfig, found: Standing, readers: Sequence[CorpusReader]
) -> Sequence[Sequence[Part]]:
    """The files of each corpus by when they came to the run."""
    anew = [[Part(0, reader)] for reader in readers]
    samples, known = found.extras["progress"]["samples"], found.extras.get("data", {})
    corpora = known.get("corpora", [])
    if not samples or not corpora:
        return anew  # no position, or no record: what differs is for `identity.compare`
    keys = identity.order_changes(config, found.extras)
    insists = "data" in config.checkpoint.allow
    if (keys and config.data.new == "restart") or len(corpora) != len(readers):
        return anew
    lists = [_generations(found, corpus) for corpus in corpora]
    if None in lists:
        if config.data.new != "append":
            return anew
        raise UserError(
            f"data.new=append: {found.path} is of a run of which no list of its files is kept, so "
            "that nothing tells which are new: data.new=restart begins the data anew"
        )
    known_lists = [generations for generations in lists if generations is not None]
    matches = list(map(match, readers, known_lists))
    if all(one.same for one in matches):
        return _as_known(readers, known_lists, matches, [0] * len(readers))
    if config.data.new == "append":
        _check_grown(found, readers, matches, keys)
        weights = [corpus["weight"] for corpus in corpora]
        return _as_known(readers, known_lists, matches, taken(weights, samples))
    if config.data.new is None and not insists:
        identity.refuse(
            [
                Change(
                    f"{reader.key} (files of {reader.name}; {one})",
                    sum(map(len, one.known)) + len(one.gone) + len(one.changed),
                    len(reader.files),
                    Effect.DATA,
                )
                for reader, one in zip(readers, matches, strict=True)
                if not one.same
            ],
            found.path,
        )
    return anew


def _generations(found: Standing, corpus: Mapping[str, Any]) -> list[Generation] | None:
    """Those of a ``corpus`` of the record; None where a list is not there."""
    generations = []
    for start, one in [(0, corpus), *((g["start"], g) for g in corpus.get("later", ()))]:
        rows = run_folder.read_files(_folder(found), one.get("files", ""))
        if rows is None:
            return None
        generations.append(Generation(start, rows))
    return generations


def _as_known(
    readers: Sequence[CorpusReader],
    known: Sequence[Sequence[Generation]],
    matches: Sequence[Match],
    starts: Sequence[int],
) -> list[list[Part]]:
    """The generations that the run knows and, from ``starts`` of each corpus on, what is new."""
    found = []
    for reader, generations, one, start in zip(readers, known, matches, starts, strict=True):
        files = [(g.start, there) for g, there in zip(generations, one.known, strict=True)]
        found.append(parts(reader, files + ([(start, one.new)] if one.new else [])))
    return found


def _check_grown(
    found: Standing, readers: Sequence[CorpusReader], matches: Sequence[Match], keys: list[Change]
) -> None:
    """Raise UserError where something else than new files is there."""
    told = [
        f"{reader.key} ({reader.name}): {one}"
        for reader, one in zip(readers, matches, strict=True)
        if not (one.same or one.grown)
    ]
    if told or keys:
        listing = "".join(f"\n  {line}" for line in told + list(map(str, keys)))
        raise UserError(
            f"data.new=append: only files may be new, but since {found.path} there are other "
            f"changes:{listing}\nPut new documents into new files and leave those that the run "
            "has read as they were, or begin the data anew with data.new=restart"
        )

"""Ways in which a saved checkpoint is not any more what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.checkpoint.toy import rewrite_meta

DATA = ("rank_00000.safetensors", "rank_00001.safetensors")
LISTS = ("rank_00000.json", "rank_00001.json")
META = "meta.json"
FILES = (*DATA, *LISTS, META)


@dataclass(frozen=True)
class Place:
    """Step folder ``path``; beside it ``older``, and ``alone``, of the same state, written by one
    rank."""

    path: Path
    older: Path
    alone: Path


@dataclass(frozen=True)
class Corruption:
    """``change`` is what is done to a checkpoint; ``named`` is part of what is said of it."""

    name: str
    change: Callable[[Place], object]
    named: str


def flip(file: Path, where: float | int) -> None:
    content = bytearray(file.read_bytes())
    content[where if isinstance(where, int) else int(where * len(content))] ^= 0x10
    file.write_bytes(content)


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def swap(first: Path, second: Path) -> None:
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


def edit_format(file: Path, to: int) -> None:
    edit(file, f'"format": {json.loads(file.read_bytes())["format"]}', f'"format": {to}')


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def without_rank_1(place: Place, *, and_its_files: bool) -> None:
    """A `meta.json` that is in itself right."""

    def forget(content: dict) -> None:
        del content["files"][DATA[1]], content["files"][LISTS[1]], content["lists"][LISTS[1]]

    rewrite_meta(place.path / META, forget)
    if and_its_files:
        for name in (DATA[1], LISTS[1]):
            (place.path / name).unlink()


def list_of_another(place: Place) -> None:
    """List and data of another step, and a `meta.json` that has been mended to fit the list."""
    for name in (DATA[0], LISTS[0]):
        shutil.copy(place.older / name, place.path / name)
    old = json.loads((place.older / META).read_bytes())
    rewrite_meta(
        place.path / META,
        lambda content: content["files"].update({LISTS[0]: old["files"][LISTS[0]]}),
    )


def everything(place: Place) -> None:
    for name in FILES:
        (place.path / name).write_bytes(b"")


def _of_each_file() -> Iterator[Corruption]:
    for name in FILES:

        def case(what: str, change: Callable[[Path], object], name: str = name) -> Corruption:
            return Corruption(f"{name}: {what}", lambda place: change(place.path / name), name)

        yield case("missing", Path.unlink)
        yield case("empty", lambda file: file.write_bytes(b""))
        yield case("cut", partial(cut, count=1))
        yield case("cut in half", lambda file: cut(file, file.stat().st_size // 2))
        yield case("one byte more", grow)
        yield case("a folder", folder_instead)
        for where in (0, 0.1, 0.3, 0.5, 0.7, 0.9, -1):
            yield case(f"flipped at {where}", partial(flip, where=where))
        if name != META:  # that of an older step is whole in itself
            yield Corruption(
                f"{name}: an older step's",
                lambda place, name=name: shutil.copy(place.older / name, place.path / name),
                name,
            )


def corruptions() -> list[Corruption]:
    def inside(name: str, what: str, change: Callable[[Path], object], named: str) -> Corruption:
        return Corruption(what, lambda place: change(place.path / name), named)

    def from_alone(name: str) -> Callable[[Place], object]:
        return lambda place: shutil.copy(place.alone / name, place.path / name)

    def swapped(names: tuple[str, str]) -> Callable[[Place], object]:
        return lambda place: swap(*(place.path / name for name in names))

    return [
        *_of_each_file(),
        inside(META, "step edited", lambda f: edit(f, '"step": 20', '"step": 10'), META),
        inside(META, "format edited", partial(edit_format, to=1), META),
        inside(META, "format of tomorrow", partial(edit_format, to=9), "9"),
        inside(META, "serial edited", lambda f: edit(f, '"serial": 2', '"serial": 9'), META),
        inside(META, "no seal", lambda f: edit(f, '"crc32"', '"crc64"'), META),
        inside(META, "no object", lambda f: f.write_text("[]"), META),
        inside(META, "another JSON", lambda f: f.write_text('{"format": 2}'), META),
        inside(
            LISTS[0], "a checksum edited", lambda f: edit(f, '"float32", ', '"float32",1'), "is"
        ),
        Corruption("files of ranks swapped", swapped(DATA), ""),
        Corruption("lists of ranks swapped", swapped(LISTS), ""),
        Corruption("another world size's data", from_alone(DATA[0]), DATA[0]),
        Corruption("another world size's list", from_alone(LISTS[0]), LISTS[0]),
        Corruption("another world size's meta.json", from_alone(META), ""),
        Corruption(
            "a rank's files too many",
            lambda place: shutil.copy(place.path / LISTS[1], place.path / "rank_00002.json"),
            "rank_00002.json is of another checkpoint",
        ),
        Corruption(
            "a rank that nobody names", partial(without_rank_1, and_its_files=False), DATA[1][:10]
        ),
        Corruption("meta.json mended to fit another step's list", list_of_another, LISTS[0]),
        Corruption("all empty", everything, META),
        Corruption("all gone", lambda place: [(place.path / f).unlink() for f in FILES], META),
    ]

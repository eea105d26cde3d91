"""Building the corpus: fetch, take the text out, leave out what is there twice, write shards.

    DIR/manifest.json            what there is, where it is from, under which licence, digests
    DIR/<source>/00000.jsonl     shards, which `data.corpus` reads: {"text", "source", "name"}
    DIR/.packages/               archives as they were fetched
    DIR/<source>/.seen.npz       hashes, for the sources after it
    DIR/<source>/.about.json     its part of the manifest

A source is there whole or not at all (a rename), so that a build that was ended goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attnres_train.corpus.duplicates import Seen
from attnres_train.corpus.packages import FetchError, fetch, members
from attnres_train.corpus.sources import SOURCES, Documents, Source, standard_library
from attnres_train.errors import UserError
from attnres_train.supervise.run_lock import run_lock

Fetch = Callable[[str, str, Path], Path]
FORMAT = 1
SHARD_BYTES = 64 << 20
_SHORTEST = 200
"""Characters of a document that is worth its end."""
_LICENCE = re.compile(
    r"^(?:License(?:-Expression)?:|Classifier: License ::)[ \t]*(\S.*)$", re.M | re.I
)


def build(
    folder: Path,
    say: Callable[[str], None],
    *,
    sources: Sequence[Source] = SOURCES,
    get: Fetch = fetch,
    instead: Callable[[], Documents] = standard_library,
) -> dict[str, Any]:
    """Build, or go on with, the corpus in ``folder``; returns its manifest. Without any package the
    documents of ``instead`` stand in. Raises UserError where another process builds there, or
    nothing can be written."""
    with run_lock(folder, "corpus", "DIR"):
        seen, missing = Seen(), {}
        for source in sources:
            try:
                _source(source, folder, seen, say, get)
            except FetchError as error:
                missing[source.name] = str(error)
                say(f"{source.name}: left out, {error}")
        if len(missing) == len(sources):
            say(
                "no package could be fetched: the corpus is this Python's standard library alone "
                "(data.corpus kind python-stdlib has the same). With a network, the same command "
                "fetches the rest"
            )
            _write("python-stdlib", folder, instead(), seen, say, {"package": "python"})
        elif (folder / "python-stdlib").is_dir():
            shutil.rmtree(folder / "python-stdlib")
        return _manifest(folder, missing)


def _source(
    source: Source, folder: Path, seen: Seen, say: Callable[[str], None], get: Fetch
) -> None:
    place = folder / source.name
    if (place / ".about.json").is_file():
        seen.load(place / ".seen.npz")
        say(f"{source.name}: there already")
        return
    archive = get(source.client, source.package, folder / ".packages")
    about = {
        "package": source.package,
        "client": source.client,
        "archive": archive.name,
        "archive_sha256": _sha256(archive),
        "licences": licences(archive),
        "is_code": source.is_code,
    }
    _write(source.name, folder, source.documents(archive), seen, say, about)


def _write(
    name: str,
    folder: Path,
    documents: Documents,
    seen: Seen,
    say: Callable[[str], None],
    about: dict[str, Any],
) -> None:
    partial, place = folder / f".{name}.partial", folder / name
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        about |= _shards(name, partial, documents, seen)
        seen.save(partial / ".seen.npz")
        (partial / ".about.json").write_text(json.dumps(about), encoding="utf-8")
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{folder}: {name} cannot be written: {error}") from error
    counts = about["documents"]
    say(
        f"{name}: {about['characters'] / 1e6:.1f} M characters in {counts['kept']:,} documents; "
        f"left out {counts['equal']:,} equal, {counts['near']:,} nearly equal, "
        f"{counts['short']:,} short"
    )


def _shards(name: str, folder: Path, documents: Documents, seen: Seen) -> dict[str, Any]:
    """Write ``documents`` and count them."""
    counts, characters = Counter({"kept": 0, "equal": 0, "near": 0, "short": 0}), 0
    shards: list[dict[str, str]] = []
    file, digest, size = None, hashlib.sha256(), SHARD_BYTES
    for title, text in documents:
        verdict = "short" if len(text) < _SHORTEST else seen.judge(text)
        counts[verdict] += 1
        if verdict != "kept":
            continue
        line = (json.dumps({"text": text, "source": name, "name": title}) + "\n").encode()
        if size + len(line) > SHARD_BYTES or file is None:
            if file is not None:
                file.close()
                shards[-1]["sha256"] = digest.hexdigest()
            shard = folder / f"{len(shards):05}.jsonl"
            file, digest, size = open(shard, "wb"), hashlib.sha256(), 0  # noqa: SIM115
            shards.append({"file": f"{name}/{shard.name}"})
        file.write(line)
        digest.update(line)
        size += len(line)
        characters += len(text)
    if file is not None:
        file.close()
        shards[-1]["sha256"] = digest.hexdigest()
    return {"documents": dict(counts), "characters": characters, "shards": shards}


def licences(archive: Path) -> list[str]:
    """What the package says of its licences: the fields of a wheel's METADATA, or of Debian's
    copyright file, which stands in full in the package."""
    pattern = re.compile(r"[^/]+\.dist-info/METADATA|usr/share/doc/[^/]+/copyright(?:\.gz)?")
    for name, content in members(archive, pattern):
        text = content.decode("utf-8", errors="replace")
        named = sorted({found.strip() for found in _LICENCE.findall(text)})
        return named or [f"see {name} in the archive"]
    return []


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(folder: Path, missing: dict[str, str]) -> dict[str, Any]:
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*/.about.json"))
    }
    manifest = {
        "format": FORMAT,
        "characters": sum(one["characters"] for one in found.values()),
        "sources": found,
        "missing": missing,
    }
    partial = folder / "manifest.json.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "manifest.json")
    return manifest

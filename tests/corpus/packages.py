"""Tiny packages, as the registries' archives look."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

LONG = "A paragraph that says what an option does, and is long enough to be worth its end. "


def wheel(path: Path, files: dict[str, str | bytes], licence: str = "Apache-2.0") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        metadata = f"Name: x\nLicense: {licence}\n"
        for name, content in {"x-1.dist-info/METADATA": metadata, **files}.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # of 1980, whenever it is made
    return path


def tar(files: dict[str, bytes], form: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w{form}") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def deb(path: Path, files: dict[str, bytes]) -> Path:
    """An ar archive of debian-binary, control.tar.xz (odd in size) and data.tar.xz."""
    copyright = {"./usr/share/doc/x/copyright": b"License: GPL-2\n the text\n"}
    named = {f"./{name}": content for name, content in files.items()}
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": tar(copyright | named, ":xz"),
    }
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    path.write_bytes(content)
    return path


def ansible(path: Path) -> Path:
    examples = "EXAMPLES = '''\n- copy: x\n'''\n"
    module = f'DOCUMENTATION = r"""\nmodule: copy\n{LONG * 3}\n"""\n{examples}'
    module += f'def main():\n    "{LONG}not documentation"\n'
    folder = "ansible_collections/a/b/plugins"
    return wheel(path, {f"{folder}/modules/copy.py": module, f"{folder}/README": LONG})


def botocore(path: Path) -> Path:
    model = {
        "operations": {
            "PutItem": {
                "documentation": f"<p>{LONG * 3}</p><ul><li>a &amp; b</li></ul>",
                "input": {"shape": "PutItemInput"},
            }
        },
        "documentation": f"<p>{LONG * 4} The service.</p>",
    }
    packed = gzip.compress(json.dumps(model).encode(), mtime=0)
    return wheel(path, {"botocore/data/x/2020-01-01/service-2.json.gz": packed})


def google(path: Path) -> Path:
    model = {"resources": {"files": {"methods": {"get": {"description": LONG * 5}}}}}
    name = "googleapiclient/discovery_cache/documents/drive.v3.json"
    return wheel(path, {name: json.dumps(model)}, "Apache 2.0")


def linux(path: Path) -> Path:
    files = {
        "linux-source-6.1/Documentation/a/b.rst": f"Title\n=====\n\n{LONG * 4}kernel\n".encode(),
        "linux-source-6.1/kernel/fork.c": b"int main(void) { return 0; }\n" * 20,
        "linux-source-6.1/tools/x.c": b"int tool(void) { return 0; }\n" * 20,
    }
    inner = lzma.compress(tar(files, ""))
    return deb(path, {"usr/src/linux-source-6.1.tar.xz": inner})


def gcide(path: Path) -> Path:
    entries = [
        f'Aback \\A*back"\\, adv.\n   {LONG * 2}\n',
        f"Abaft\n   {LONG}x\n",
        f"Bag\n  {LONG * 3}",
    ]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return digits[value // 4096] + digits[value // 64 % 64] + digits[value % 64]

    index, start = "", 0
    for entry in entries:
        index += f"{entry.split()[0].lower()}\t{number(start)}\t{number(len(entry))}\n"
        start += len(entry)
    index += index.splitlines()[0].replace("aback", "abacks") + "\n"  # two words, one entry
    folder = "usr/share/dictd/"
    packed = gzip.compress("".join(entries).encode(), mtime=0)
    return deb(path, {f"{folder}gcide.dict.dz": packed, f"{folder}gcide.index": index.encode()})

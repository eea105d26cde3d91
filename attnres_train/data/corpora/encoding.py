"""Where a file is no UTF-8 text, told by line and byte."""

from __future__ import annotations

import codecs
from pathlib import Path

from attnres_train.errors import UserError

_AT_ONCE_BYTES = 1 << 20
_HEAD_BYTES = 4096
# The longer one first: a file in UTF-32 begins as one in UTF-16 does.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check_encoding(head: bytes, file: Path) -> None:
    """Raises UserError where ``file``, which begins with ``head``, is text in UTF-16 or UTF-32, or
    none: much of it would pass for UTF-8, with a NUL before each character."""
    head = head[:_HEAD_BYTES]
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            raise UserError(f"{file} is {name} text (byte 0): {_convert(name)}")
    if 4 * head.count(0) > len(head):
        where = f"byte {head.index(0)}"
        raise UserError(
            f"{file} is not UTF-8 text: every few bytes a NUL, the first at {where}, as in UTF-16 "
            f"text or in no text at all: {_convert('UTF-16')}, or take it out of the corpus"
        )


def no_utf8(file: Path) -> UserError:
    """What to raise for ``file``, in which a byte is no UTF-8: it is looked for."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, before = 1, 0
    with open(file, "rb") as stream:
        while True:
            piece = stream.read(_AT_ONCE_BYTES)
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                offset = before - kept + error.start
                return UserError(
                    f"{file} is not UTF-8 text: {error.reason} at line {line}, byte {offset} "
                    f"(0x{error.object[error.start]:02x}): {_convert('ISO-8859-1')}, if it is that"
                )
            if not piece:
                return UserError(f"{file} is not UTF-8 text")
            line, before = line + piece.count(b"\n"), before + len(piece)


def _convert(name: str) -> str:
    return f"convert it, for example by `iconv -f {name} -t UTF-8`"

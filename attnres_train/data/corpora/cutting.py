"""Where a long text may be cut so that its parts have the tokens of the whole."""

from __future__ import annotations

import re

# A line's end between two characters that are none, and no space.
_SINGLE_LINE_END = re.compile(r"(?<=\S\n)(?=\S)")
# Of a long text, this many characters at its end are looked at.
_LOOKED_AT = 1 << 12


def place_to_cut(text: str) -> int:
    """A place in ``text``, 0 < place <= len(text), as near to its end as can be.

    Best is one where tokenizers that split text into words before merging do so whatever stands
    around it: before a space that follows a letter or a digit, else after the end of a line that
    neither follows nor is followed by white space. So do the expressions of GPT-2, GPT-4 and Kimi.
    Where neither is found, a text is cut after a line, or, without lines, at its end: there, and by
    a tokenizer that merges across words or begins every text with a space, the tokens at the cut
    may differ from the whole's.
    """
    for start in (max(0, len(text) - _LOOKED_AT), 0):
        place = text.rfind(" ", start + 1)
        while place > 0 and not text[place - 1].isalnum():
            place = text.rfind(" ", start + 1, place)
        if place > 0:
            return place
        if ends := [found.start() for found in _SINGLE_LINE_END.finditer(text, start)]:
            return ends[-1]
    return text.rfind("\n") + 1 or len(text)

"""What must not be written down with a run: keys and passwords of its command line or config."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
# The last word of a key. A token alone may be one of a vocabulary.
_NAMES = (
    r"(?:api_?key|secret(?:_?key)?|password|passwd|credentials?|"
    r"(?:auth|access|api|hf|hub|bearer|refresh|session)_?token)"
)
_KEY = re.compile(rf"(?:.*[._-])?{_NAMES}", re.IGNORECASE)
_SETTING = re.compile(rf"(?P<key>-{{0,2}}[\w.-]*?{_NAMES})=.+", re.IGNORECASE | re.DOTALL)
_IN_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s@]*@", re.IGNORECASE)
_QUERY = re.compile(
    rf"(?P<key>[?&](?:[\w-]*{_NAMES}|sig|signature|x-amz-[\w-]+))=[^&\s'\"]+", re.IGNORECASE
)


def without_secrets(value: Any) -> Any:
    """A copy of ``value`` (plain lists, dicts, texts) in which passwords in URLs, values of keys
    such as ``api_key``, and ``key=value`` texts of such keys are replaced by `HIDDEN`."""
    if isinstance(value, dict):
        return {
            key: HIDDEN
            if isinstance(inner, str) and inner and _KEY.fullmatch(str(key))
            else without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    if isinstance(value, str):
        if setting := _SETTING.fullmatch(value):
            return f"{setting['key']}={HIDDEN}"
        value = _IN_URL.sub(rf"\g<scheme>{HIDDEN}@", value)
        return _QUERY.sub(rf"\g<key>={HIDDEN}", value)
    return value

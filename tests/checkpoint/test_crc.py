"""One checksum, whoever computes it."""

from __future__ import annotations

import importlib
import sys
import zlib
from unittest import mock

import pytest

from attnres_train.checkpoint import crc


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 100_003])
def test_it_is_zlibs(length):
    data = bytes(n * n % 251 for n in range(length))
    assert crc.crc32(data) == zlib.crc32(data)
    half = length // 2
    assert crc.crc32(memoryview(data)[half:], crc.crc32(data[:half])) == zlib.crc32(data)


def test_without_zlib_ng_it_is_zlib_itself():
    try:
        with mock.patch.dict(sys.modules, {"zlib_ng": None, "zlib_ng.zlib_ng": None}):
            assert importlib.reload(crc).crc32 is zlib.crc32
    finally:
        importlib.reload(crc)

from __future__ import annotations

import gc

import pytest

from attnres_train.loading import without_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was_afterwards(enabled):
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(ImportError), without_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()

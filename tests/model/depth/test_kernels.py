"""The Triton kernels of depth attention, compiled for a GPU that need not be there: Triton's
interpreter, which runs them in the tests, takes more than its compiler does."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from attnres_train.model.depth import kernels, launch

HOPPER = GPUTarget("cuda", 90, 32)
N, S, D = 3, 2, 896
MATRIX, STATISTIC = "*bf16", "*fp32"
SOURCES, READS = (MATRIX,) * 4, (MATRIX,) * S  # sources are padded to a power of two
TILE = launch._tile_options(S, D, [torch.empty(1, D, dtype=torch.bfloat16)] * N)
ROW = launch._row_options(D)


def ptx(kernel, options, **types):
    """The kernel with arguments of ``types`` and its other parameters from ``options``."""
    options = dict(options)
    compiler_options = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in options.items()}
    source = ASTSource(kernel, signature, constants, {})
    return compile(source, target=HOPPER, options=compiler_options).asm["ptx"]


CASES = {
    "phase1_forward": (
        TILE | {"eps": 1e-5},
        {"queries": STATISTIC, "sources": SOURCES, "outputs": READS, "count": "i32"}
        | dict.fromkeys(["logits", "lse", "inv_rms"], STATISTIC),
    ),
    "phase1_backward": (
        TILE,
        {"queries": STATISTIC, "sources": SOURCES, "grad_outputs": READS, "count": "i32"}
        | {"grad_sources": SOURCES}
        | dict.fromkeys(["grad_lse", "logits", "inv_rms", "along_query"], STATISTIC),
    ),
    "query_gradient": (
        TILE | ROW | {"S": S, "TOKENS": 4},
        {"sources": SOURCES, "along_query": STATISTIC, "sums": STATISTIC, "tokens": "i32"},
    ),
    "merge_forward": (
        ROW | {"eps": 1e-5},
        dict.fromkeys(["read", "partial", "output"], MATRIX)
        | dict.fromkeys(["query", "lse", "logit", "inv_rms", "weight"], STATISTIC),
    ),
    "merge_backward": (
        ROW,
        dict.fromkeys(["partial", "output", "grad", "grad_read", "grad_partial"], MATRIX)
        | dict.fromkeys(
            ["query", "logit", "inv_rms", "weight", "grad_lse", "along_query"], STATISTIC
        ),
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_a_gpu(name):
    options, types = CASES[name]
    assert f".visible .entry {name}(" in ptx(getattr(kernels, name), options, **types)


def test_sources_are_loaded_16_bytes_at_a_time():
    """The compiler sees from ``ALIGNMENT`` alone that it may."""
    options, types = CASES["query_gradient"]
    wide, narrow = (
        ptx(kernels.query_gradient, options | {"ALIGNMENT": alignment}, **types)
        for alignment in (TILE["ALIGNMENT"], 2)
    )
    assert TILE["ALIGNMENT"] == 16
    assert re.search(r"ld\.global\S*\.v4\.b32", wide)
    assert not re.search(r"ld\.global\S*\.v4\.b32", narrow)

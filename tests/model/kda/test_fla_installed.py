"""Our calls against the chunk_kda of the fla that is installed: its own Python front, with its
checks of arguments, around the recurrence in plain torch. The front is read from its file, since
importing fla needs Triton."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnres_train.model.kda.gated import gated_kda
from attnres_train.model.kda.inputs import DecayGate, KDAInputs
from attnres_train.model.kda.operator import chunk_kda
from tests.model.kda.reference import log_decay, random_inputs, recurrence


def source_of_chunk_kda() -> Path:
    fla = importlib.util.find_spec("fla")
    folders = (fla and fla.submodule_search_locations) or []
    paths = [Path(folder) / "ops" / "kda" / "chunk.py" for folder in folders]
    found = next((path for path in paths if path.is_file()), None)
    return found or pytest.skip("fla-core is not installed")


def kernel(
    *, q, k, v, g, beta, A_log, dt_bias, scale, initial_state, lower_bound, cu_seqlens, **flags
) -> tuple[Tensor, Tensor | None]:
    """What fla documents for the arguments of its autograd function."""
    if flags["use_qk_l2norm_in_kernel"]:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if flags["use_gate_in_kernel"]:
        g = log_decay(g + dt_bias.view(g.shape[-2:]), A_log.exp().unsqueeze(-1), lower_bound)
    if flags["use_beta_sigmoid_in_kernel"]:
        beta = beta.sigmoid()
    borders = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    results = []
    for i, (start, end) in enumerate(pairwise(borders)):
        state = initial_state
        if state is not None:
            state = state.to(k.dtype) if cu_seqlens is None else state[i : i + 1].to(k.dtype)
        document = (x[:, start:end] for x in (q, k, v, g, beta))
        results.append(recurrence(*document, state, scale))
    outputs, states = zip(*results, strict=True)
    state = torch.cat(states) if flags["output_final_state"] else None
    return torch.cat(outputs, dim=1), state


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Lets our operators call fla's chunk_kda; the arguments that its autograd function gets."""
    path = source_of_chunk_kda()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {node.name: node for node in tree.body if hasattr(node, "name")}
    function = top["chunk_kda"]
    function.decorator_list = []  # its choice among backends
    forward = next(x for x in top["ChunkKDAFunction"].body if getattr(x, "name", "") == "forward")
    names = [argument.arg for argument in forward.args.args[1:]]

    recorded: list[dict] = []

    def apply(*arguments):
        recorded.append(dict(zip(names, arguments, strict=True)))
        return kernel(**recorded[-1])

    namespace = {"torch": torch, "warnings": warnings, "IS_NPU": False}
    namespace["ChunkKDAFunction"] = SimpleNamespace(apply=apply)
    unread_annotations = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*unread_annotations, function], []), path, "exec"), namespace)
    for user in ("operator", "fla"):
        kernel_of = f"attnres_train.model.kda.{user}.kda_kernel"
        monkeypatch.setattr(kernel_of, lambda k, chunk_size: namespace["chunk_kda"])
    return recorded


def check_equal(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("borders", [None, [0, 7, 12, 20]])
def test_states_and_documents(calls, borders, scale):
    inputs = random_inputs(1, 20, 2, 4, 3, -0.2)
    documents = list(pairwise(borders or [0, 20]))
    rng = torch.Generator().manual_seed(1)
    states = torch.randn(len(documents), 2, 4, 3, generator=rng).double()
    borders = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    options = {"scale": scale, "cu_seqlens": borders}
    o, final = chunk_kda(*inputs, initial_state=states, output_final_state=True, **options)
    assert len(calls) == 1
    for i, (start, end) in enumerate(documents):
        wanted, state = recurrence(*(x[:, start:end] for x in inputs), states[i : i + 1], scale)
        check_equal(o[:, start:end], wanted)
        check_equal(final[i : i + 1], state)


@pytest.mark.parametrize("borders", [None, [0, 7, 12, 40]])
@pytest.mark.parametrize("lower_bound", [None, -5.0, -7.0])
def test_gates(calls, lower_bound, borders, monkeypatch):
    rng = torch.Generator().manual_seed(2)
    qkv_decay = torch.randn(4, 2, 20, 2, 8, generator=rng, dtype=torch.float64)
    raw = KDAInputs(*qkv_decay, torch.randn(2, 20, 2, generator=rng, dtype=torch.float64))
    A_log = torch.tensor([0.3, -0.2], dtype=torch.float64).view(1, 1, 2, 1)
    dt_bias = torch.linspace(-1, 1, 16, dtype=torch.float64)
    gate = DecayGate(A_log, dt_bias, lower_bound)
    borders = None if borders is None else torch.tensor(borders)
    got = gated_kda(raw, gate, cu_seqlens=borders, chunk_size=64)
    assert [call["use_gate_in_kernel"] for call in calls] == [True]
    assert calls[0]["safe_gate"] is (lower_bound == -5.0)
    monkeypatch.undo()
    check_equal(got, gated_kda(raw, gate, cu_seqlens=borders, chunk_size=64))

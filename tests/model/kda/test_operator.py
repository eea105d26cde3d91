from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from attnres_train.model.kda.operator import chunk_kda, recurrent_kda_step
from tests.model.kda.reference import random_inputs, recurrence

DECAYS = [-1e-3, -0.1, -1.0, -10.0, -100.0, "mixed", "channels"]


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b`` (over 1 if b vanishes)."""
    assert a.shape == b.shape
    norm = b.norm().item()
    return (a.double() - b.double()).norm().item() / (norm if norm > 1e-30 else 1.0)


def gradients(function, inputs: list[Tensor], dtype=torch.float64) -> list[Tensor]:
    """Output, final state, and the gradients of a fixed weighting of both."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    results = function(*inputs)
    rng = torch.Generator().manual_seed(7)
    weights = [torch.randn(r.shape, generator=rng, dtype=torch.float64) for r in results]
    loss = sum((r * w.to(dtype)).sum() for r, w in zip(results, weights, strict=True))
    return [r.detach() for r in results] + list(torch.autograd.grad(loss, inputs))


def chunked(q, k, v, g, beta, state=None, **options):
    return chunk_kda(
        q, k, v, g, beta, initial_state=state, output_final_state=True, chunk_size=16, **options
    )


def with_state(inputs: list[Tensor]) -> list[Tensor]:
    k, v = inputs[1], inputs[2]
    rng = torch.Generator().manual_seed(3)
    shape = (k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    return [*inputs, torch.randn(shape, generator=rng, dtype=torch.float64)]


@pytest.mark.parametrize("log_decay", DECAYS)
@pytest.mark.parametrize("length", [1, 2, 7, 16, 17, 50])
def test_chunks_equal_the_recurrence(length, log_decay):
    inputs = with_state(random_inputs(2, length, 2, 4, 3, log_decay))
    wanted, got = gradients(recurrence, inputs), gradients(chunked, inputs)
    assert max(distance(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-12


@pytest.mark.parametrize("log_decay", DECAYS)
def test_fp32_loses_nothing_at_any_decay(log_decay):
    inputs = with_state(random_inputs(1, 150, 2, 8, 8, log_decay))
    inputs = [x.float().double() for x in inputs]
    wanted = gradients(recurrence, inputs)
    got = gradients(
        lambda *x: chunk_kda(*x[:5], initial_state=x[5], output_final_state=True),
        inputs,
        torch.float32,
    )
    assert all(x.dtype == torch.float32 for x in got)
    assert max(distance(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-5


def test_a_small_step_keeps_its_digits_after_a_strong_one():
    inputs = random_inputs(1, 64, 1, 8, 8, -1e-3)
    inputs[3][:, 5] = -5000.0
    wanted, _ = recurrence(*inputs)
    got, _ = chunk_kda(*(x.float() for x in inputs))
    assert distance(got, wanted) < 1e-6


def test_gradcheck():
    inputs = with_state(random_inputs(1, 5, 1, 3, 2, -0.5))
    inputs = [x.requires_grad_() for x in inputs]

    def function(q, k, v, g, beta, state):
        return chunk_kda(
            q, k, v, g, beta, initial_state=state, output_final_state=True, chunk_size=2
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 32, 64, 128])
def test_chunk_size_changes_nothing(chunk_size):
    inputs = random_inputs(1, 40, 2, 4, 4, "mixed")
    wanted, _ = recurrence(*inputs)
    assert distance(chunk_kda(*inputs, chunk_size=chunk_size)[0], wanted) < 1e-13


def test_chunk_size_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="power of two, not 48"):
        chunk_kda(*random_inputs(1, 4, 1, 2, 2, -1), chunk_size=48)


def test_groups_of_chunks_hang_together():
    """40 heads and 5 chunks are more tiles than one group holds."""
    inputs = with_state(random_inputs(1, 70, 40, 2, 2, -0.3))
    wanted, got = gradients(recurrence, inputs), gradients(chunked, inputs)
    assert max(distance(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-12


def test_scale():
    inputs = random_inputs(1, 20, 1, 4, 4, -0.3)
    wanted = recurrence(*inputs, scale=0.7)[0]
    assert distance(chunk_kda(*inputs, scale=0.7)[0], wanted) < 1e-13


def test_bf16_inputs_are_computed_in_fp32():
    inputs = [x.bfloat16() for x in random_inputs(1, 50, 2, 8, 8, -0.3)]
    inputs[3] = inputs[3].float()
    o, state = chunk_kda(*inputs, output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    wanted, _ = recurrence(*(x.double() for x in inputs))
    assert distance(o, wanted) < 2**-8


def test_state_continues_a_sequence():
    inputs = random_inputs(2, 45, 2, 4, 4, -0.2)
    whole, final = chunked(*inputs)
    first, state = chunked(*(x[:, :19] for x in inputs))
    second, state = chunked(*(x[:, 19:] for x in inputs), state)
    assert distance(torch.cat((first, second), 1), whole) < 1e-13
    assert distance(state, final) < 1e-13


@pytest.mark.parametrize("prompt", [0, 1, 13])
def test_steps_continue_the_chunked_form(prompt):
    """A prompt at once, then token by token, and what follows at once again."""
    inputs = random_inputs(2, 30, 2, 4, 3, "mixed")
    whole, final = chunked(*inputs)
    outputs, state = [], None
    if prompt:
        o, state = chunked(*(x[:, :prompt] for x in inputs))
        outputs.append(o)
    for t in range(prompt, 21):
        o, state = recurrent_kda_step(*(x[:, t] for x in inputs), state)
        outputs.append(o.unsqueeze(1))
    o, state = chunked(*(x[:, 21:] for x in inputs), state)
    assert distance(torch.cat((*outputs, o), 1), whole) < 1e-13
    assert distance(state, final) < 1e-13


def step_of_first_token(*inputs):
    return recurrent_kda_step(*(x[:, 0] for x in inputs[:5]), inputs[5])


@pytest.mark.parametrize("function", [chunked, step_of_first_token])
def test_autocast_changes_nothing(function):
    inputs = [x.float() for x in with_state(random_inputs(1, 40, 2, 8, 8, -0.3))]
    wanted = function(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = function(*inputs)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("borders", [None, [0, 7, 7, 40, 40]])
def test_compiles_in_one_graph(borders):
    inputs = random_inputs(1, 40, 2, 4, 3, -0.3)
    borders = None if borders is None else torch.tensor(borders)

    def function(*inputs):
        o, state = chunk_kda(
            *inputs, cu_seqlens=borders, output_final_state=borders is None, chunk_size=16
        )
        return (o,) if state is None else (o, state)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(gradients(compiled, inputs), gradients(function, inputs), strict=True):
        assert torch.equal(got, wanted)


class TestPacking:
    borders = (0, 1, 20, 20, 33, 48, 60)

    def separate(self, *inputs):
        documents = [
            chunked(*(x[:, a:b] for x in inputs))[0]
            for a, b in zip(self.borders, self.borders[1:], strict=False)
            if b > a
        ]
        return (torch.cat(documents, 1),)

    def packed(self, *inputs):
        return (chunk_kda(*inputs, cu_seqlens=torch.tensor(self.borders), chunk_size=16)[0],)

    @pytest.mark.parametrize("log_decay", [-1e-3, "mixed"])
    def test_packed_equals_separate(self, log_decay):
        inputs = random_inputs(1, 60, 2, 4, 3, log_decay)
        wanted, got = gradients(self.separate, inputs), gradients(self.packed, inputs)
        assert max(distance(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-12

    def test_not_a_bit_passes_a_border(self):
        inputs = random_inputs(1, 60, 2, 4, 3, -1e-3)
        before = self.packed(*inputs)[0]
        inputs[2][:, :33] *= 1e6
        assert torch.equal(self.packed(*inputs)[0][:, 33:], before[:, 33:])

    def test_rows_are_documents_of_their_own(self):
        inputs = random_inputs(2, 30, 2, 4, 3, -0.1)
        borders = torch.tensor([0, 12, 30, 47, 60], dtype=torch.int32)
        got, _ = chunk_kda(*inputs, cu_seqlens=borders, chunk_size=16)
        flat = [x.flatten(0, 1).unsqueeze(0) for x in inputs]
        wanted, _ = chunk_kda(*flat, cu_seqlens=borders, chunk_size=16)
        assert distance(got.flatten(0, 1), wanted[0]) < 1e-13

    def test_states_count_documents(self):
        inputs = random_inputs(1, 60, 2, 4, 3, -0.1)
        states = torch.randn(6, 2, 4, 3, dtype=torch.float64)
        borders = torch.tensor(self.borders)
        o, final = chunk_kda(
            *inputs, initial_state=states, output_final_state=True, cu_seqlens=borders
        )
        for i, (a, b) in enumerate(zip(self.borders, self.borders[1:], strict=False)):
            if a == b:
                assert torch.equal(final[i], states[i])
                continue
            document = [x[:, a:b] for x in inputs]
            wanted, state = recurrence(*document, states[i : i + 1])
            assert distance(o[:, a:b], wanted) < 1e-13
            assert distance(final[i : i + 1], state) < 1e-13

    def test_states_of_several_rows_are_refused(self):
        inputs = random_inputs(2, 6, 1, 2, 2, -0.1)
        with pytest.raises(ValueError, match="batch of 1, not 2"):
            chunk_kda(*inputs, output_final_state=True, cu_seqlens=torch.tensor([0, 6, 12]))


def test_memory_is_linear_and_lean():
    """Saved: the inputs and one state per chunk. Made on the way: nothing larger than an input or a
    group of tiles."""
    length, heads, size, chunk = 4096, 1, 8, 16
    inputs = [x.float().requires_grad_() for x in random_inputs(1, length, heads, size, size, -0.1)]
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.numel()
        return x

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with saved_tensors_hooks(pack, lambda x: x):
            o, _ = chunk_kda(*inputs, chunk_size=chunk)
        o.sum().backward()
    states = (math.ceil(length / chunk) + 1) * heads * size * size
    assert sum(saved.values()) == sum(x.numel() for x in inputs) + states
    largest = max(event.self_cpu_memory_usage for event in profiler.events()) // 4
    assert states <= largest <= max(length * heads * size, 32 * chunk * 2 * max(chunk, size))

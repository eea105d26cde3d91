"""Text during training is what the checkpoint of the step writes, on every grid, and changes
nothing of the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnres_train.checkpoint.folders import step_name
from attnres_train.config import check_config
from attnres_train.errors import UserError
from attnres_train.inference.decoding import CachedDecoder
from attnres_train.inference.opening import open_model
from attnres_train.inference.sampling import Sampling
from attnres_train.inference.text import complete, prompt_tokens
from attnres_train.observe.observer import Sample
from attnres_train.observe.sample_lines import SampleLines, read_samples
from tests.tiny import STEPS, TinyRuns, column, grid

PROMPTS = ["One word", ""]
ASKED = "log.samples={interval: 3, prompts: ['One word', ''], max_new_tokens: 6, temperature: 0}"
GRIDS: dict[str, list[str]] = {
    "one process": [],
    "pipeline": grid(2, 2),
    "experts": ["parallel.expert_model_parallel_size=2"],
    "context": ["parallel.context_parallel_size=2"],
    "tensor": ["parallel.tensor_model_parallel_size=2"],
}


def written_by(step_folder: Path) -> list[str]:
    """What one process writes with a checkpoint."""
    opened = open_model(step_folder)
    assert opened.tokenizer is not None
    tokens = [prompt_tokens(opened.tokenizer, prompt, None) for prompt in PROMPTS]
    decoder, greedy = CachedDecoder.of(opened.chunk), Sampling(temperature=0)
    return [text.text for text in complete(decoder, opened.tokenizer, tokens, greedy, 6)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.nightly] * (n in ("context", "tensor"))) for n in GRIDS],
)
def test_samples_are_the_checkpoints_text(tiny: TinyRuns, name: str) -> None:
    ranks = 1 if name == "one process" else 2
    call = (f"samples-{name.replace(' ', '-')}", ASKED, *GRIDS[name])
    run = tiny.train(*call, ranks=ranks)
    lines = read_samples(run / "samples.jsonl")
    expected = {
        step: written_by(run / "checkpoints" / step_name(step)) for step in (STEPS // 2, STEPS)
    }
    assert lines == [
        {"step": step, "prompt": prompt, "text": text}
        for step, texts in expected.items()
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    assert 'sample after step 3: "One word' in tiny.screen(*call, ranks=ranks)


def test_the_run_is_the_same(tiny: TinyRuns) -> None:
    with_samples = tiny.train("samples-one-process", ASKED)
    assert column(with_samples, "loss") == column(tiny.train("opened-1"), "loss")


def test_steps_that_come_again_are_written_again(tmp_path: Path) -> None:
    def lines(step: int) -> Any:
        observer = SampleLines(None, "log.samples", SimpleNamespace(folder=tmp_path))  # type: ignore[arg-type]
        observer.on_start(step)
        return observer

    observer = lines(0)
    for step in (1, 2, 3):
        observer.on_samples(step, [Sample("a", f"line\n{step}\u2028"), Sample("", "b")])
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"step": 4, "pro')
    lines(2)
    assert [line["step"] for line in read_samples(tmp_path / "samples.jsonl")] == [1, 1, 2, 2]
    observer.on_roll_back(1)
    kept = read_samples(tmp_path / "samples.jsonl")
    assert kept[0] == {"step": 1, "prompt": "a", "text": "line\n1\u2028"}
    assert [line["step"] for line in kept] == [1, 1]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["parallel.expert_model_parallel_size=2", "parallel.expert_dispatcher=bounded"],
            "parallel.expert_dispatcher is bounded",
        ),
    ],
    ids=["bounded"],
)
def test_what_is_refused(tiny: TinyRuns, overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=f"log.samples.interval is 3, but {told}"):
        check_config(tiny.config(ASKED, *overrides))

"""The adapter for lm-evaluation-harness, where that is installed, on tasks of our own files."""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from attnres_train.__main__ import main
from attnres_train.errors import UserError
from attnres_train.inference.opening import Opened, open_model
from attnres_train.model.batch import MicroBatch
from tests.evaluation.models import imported
from tests.tiny import free_port, grid, torchrun_environment

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from attnres_train.evaluation.harness import HarnessModel, over_processes  # noqa: E402

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE")
DOCUMENTS = [
    {"question": "the quick brown", "choices": [" fox jumps", " dog", " lazy cats"], "gold": 1},
    {"question": "two cats while a", "choices": [" dog", " the the"], "gold": 0},
    {"question": "over", "choices": [" a lazy dog", " brown"], "gold": 0},
]
TEXTS = ["the lazy dog jumps over two cats while " * 6, "a fox"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return imported(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def opened(run) -> Opened:
    return open_model(run)


def log_likelihoods(opened: Opened, ids: list[int]) -> tuple[list[float], list[bool]]:
    """Of every token but the first: its log-probability, and whether it is the likeliest."""
    tokens = torch.tensor([ids])
    batch = MicroBatch(tokens, tokens, torch.ones(tokens.shape))
    with torch.no_grad():
        found = opened.chunk.logits(batch, {}, None)[0].double().log_softmax(-1)
    pairs = list(enumerate(ids[1:]))
    return (
        [found[place, label].item() for place, label in pairs],
        [found[place].argmax().item() == label for place, label in pairs],
    )


def task(folder: Path, name: str, rows: list[dict], **settings) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    for name in OFFLINE:
        monkeypatch.setenv(name, str(tmp_path / "cache") if name.endswith("CACHE") else "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    task(
        folder,
        "our_choice",
        DOCUMENTS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{gold}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    task(
        folder,
        "our_text",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    )
    return folder


def test_scores_are_those_of_a_hand_computation(run, opened, tasks, capsys):
    names = ["our_choice", "our_text"]
    command = ["harness", str(run), "--tasks", *names, "--include-path", str(tasks), "--json"]
    assert main([*command, "--device", "cpu", "--batch-size", "3"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])

    right = 0
    for document in DOCUMENTS:
        given = opened.tokenizer.encode(document["question"])
        scores = []
        for choice in document["choices"]:
            ids = opened.tokenizer.encode(document["question"] + choice)
            scores.append(sum(log_likelihoods(opened, ids)[0][len(given) - 1 :]))
        right += max(range(len(scores)), key=scores.__getitem__) == document["gold"]
    assert found["our_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))

    nats = 0.0
    for text in TEXTS:
        ids = [opened.tokenizer.eod, *opened.tokenizer.encode(text)]
        # Windows of 32 tokens, each of which predicts what the one before has not.
        for start in range(1, len(ids), 32):
            stop = min(start + 32, len(ids))
            window = ids[max(0, stop - 33) : stop]
            nats -= sum(log_likelihoods(opened, window)[0][-(stop - start) :])
    size = sum(len(text.encode()) for text in TEXTS)
    bits = nats / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() / size
    assert len(opened.tokenizer.encode(TEXTS[0])) > 32
    assert found["our_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_the_command_as_one_of_several_processes(run, tasks, pool, capsys):
    command = ["harness", str(run), "--include-path", str(tasks), "--json", "--device", "cpu"]
    command += ["--tasks", "our_choice", "our_text", *grid(2, 1)]
    offline = {name: os.environ[name] for name in OFFLINE}
    on_main, other = pool.run(printed_by_rank, 2, command, offline, free_port())
    assert other == ""
    assert main([word for word in command if "=" not in word]) == 0
    outs = on_main, capsys.readouterr().out
    got, expected = (json.loads(out[out.index("{") :]) for out in outs)
    for name, key in (("our_choice", "acc,none"), ("our_text", "bits_per_byte,none")):
        assert got[name][key] == pytest.approx(expected[name][key], rel=1e-5)


def printed_by_rank(command: list[str], offline: dict[str, str], port: int) -> str:
    with (
        mock.patch.dict(os.environ, offline),
        torchrun_environment(port),
        redirect_stdout(io.StringIO()) as screen,
    ):
        assert main(command) == 0
    return screen.getvalue()


@pytest.mark.parametrize(
    "overrides", [grid(2, 1), ["parallel.expert_model_parallel_size=2"]], ids=str
)
def test_answers_of_several_processes_are_those_of_one(run, pool, overrides):
    """Text to the letter, likelihoods to the rounding of fp32."""
    on_main, other = pool.run(answers_by_rank, 2, str(run), overrides, free_port())
    assert other is None
    texts, likely, rolling = answers(HarnessModel(str(run), device="cpu"))
    assert on_main[0] == texts
    assert [best for _, best in on_main[1]] == [best for _, best in likely]
    assert [nats for nats, _ in on_main[1]] == pytest.approx([n for n, _ in likely], rel=1e-5)
    assert on_main[2] == pytest.approx(rolling, rel=1e-5)


def answers(model: HarnessModel) -> tuple[list, list, list]:
    """Continuations, log-likelihoods of continuations and of whole texts."""

    def asked(kind: str, *words: object) -> list[Instance]:
        return [Instance(kind, {}, words, 0)]

    settings = {"until": [], "max_gen_toks": 6}
    return (
        model.generate_until(asked("generate_until", "the quick", settings)),
        model.loglikelihood(asked("loglikelihood", "two cats", " while a dog")),
        model.loglikelihood_rolling(asked("loglikelihood_rolling", TEXTS[0])),
    )


def answers_by_rank(run: str, overrides: list[str], port: int) -> tuple[list, list, list] | None:
    with torchrun_environment(port):
        with pytest.raises(UserError, match="2 processes were started, of which each"):
            HarnessModel(run, device="cpu")
        with over_processes(run, overrides, "cpu") as model:
            return None if model is None else answers(model)


def test_the_task_of_the_docs(run, tmp_path, tasks, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "my_tasks").mkdir()
    for name, language in (("questions.jsonl", "json"), ("my_task.yaml", "yaml")):
        (block,) = re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)
        (folder / name).write_text(block)
    (command,) = re.findall(r"^    attnres-train (harness .*--include-path.*)$", page, re.M)
    words = [str(run) if word == "runs/mine" else word for word in command.split()]
    assert main([*words, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])["my_task"]
    assert found["acc,none"] in (0.0, 0.5, 1.0) and "acc_stderr,none" in found


def test_greedy_continuations_and_stops(run, opened):
    model = HarnessModel(str(run), device="cpu", batch_size="2")
    prompt = opened.tokenizer.encode("the quick")
    ids: list[int] = []
    for _ in range(6):  # by the full forward
        tokens = torch.tensor([prompt + ids])
        batch = MicroBatch(tokens, tokens, torch.ones(tokens.shape))
        ids.append(opened.chunk.logits(batch, {}, None)[0, -1].argmax().item())
    assert opened.tokenizer.eod not in ids
    text = opened.tokenizer.decode(ids)
    assert len(text) > 3
    for until, expected in (([], text), ([text[2:4]], text[: text.index(text[2:4])])):
        settings = {"until": until, "max_gen_toks": 6}
        request = Instance("generate_until", {}, ("the quick", settings), 0)
        assert model.generate_until([request]) == [expected]

    # What greedy decoding gives is said to be greedy.
    continuation = ids[:3]
    both = model._loglikelihood_tokens(
        [(None, prompt, continuation), (None, prompt, [(continuation[0] + 1) % 300])]
    )
    assert [greedy for _, greedy in both] == [True, False]
    expected = sum(log_likelihoods(opened, prompt + continuation)[0][-3:])
    assert both[0][0] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_is_told(run, tasks, capsys):
    assert main(["harness", str(run), "--tasks", "no_such_task_of_ours"]) == 2
    assert "no such task" in capsys.readouterr().err
    assert main(["harness", str(run), "--tasks", *grid(2, 1)]) == 2
    assert "and no task" in capsys.readouterr().err

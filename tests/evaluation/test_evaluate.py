"""`attnres-train eval`: against validation in training, and against logits."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from attnres_train.__main__ import main
from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.errors import UserError
from attnres_train.evaluation.evaluate import evaluate, position_edges
from attnres_train.evaluation.samples import held_out, other_data, with_data
from attnres_train.inference.opening import open_model
from attnres_train.model.batch import MicroBatch
from tests.checkpoint.old_format import save_old
from tests.data.tiny import write_text
from tests.evaluation.models import imported
from tests.tiny import STEPS, column, grid, records, saved_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return imported(tmp_path_factory.mktemp("run"))


@pytest.fixture
def opened(run):
    return open_model(run, dtype=torch.float64)


def by_hand(opened, samples) -> list[tuple[int, int, int, float, bool, float]]:
    """(sample, corpus, position, nats, likeliest, bytes) of every token, from the logits."""
    rows = []
    for number in samples.numbers:
        row = samples.row(number)
        tokens, labels = row["tokens"][None], row["labels"][None]
        batch = MicroBatch(tokens, labels, torch.ones(tokens.shape))
        with torch.no_grad():
            losses = -opened.chunk.logits(batch, {}, None)[0].log_softmax(-1)
        for place, label in enumerate(labels[0].tolist()):
            size = 0 if label == opened.tokenizer.eod else len(opened.tokenizer.decode([label]))
            best = losses[place].argmin().item() == label
            rows.append(
                (number, samples.corpus(number), place, losses[place, label].item(), best, size)
            )
    return rows


def test_every_figure_is_that_of_the_logits(opened):
    samples = held_out(opened.config, opened.tokenizer, 2)
    found, rows = evaluate(opened.chunk, samples, 3), by_hand(opened, samples)
    assert set(samples.names) == {0, 1} and found.whole.sequences == 8

    def check(figures, which):
        nats = [one[3] for one in which]
        assert figures.tokens == len(which)
        assert figures.loss == pytest.approx(sum(nats) / len(nats), rel=1e-9)
        assert figures.perplexity == pytest.approx(math.exp(figures.loss))
        size = sum(one[5] for one in which)
        assert figures.bytes == size
        assert figures.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-9)
        assert figures.accuracy == pytest.approx(sum(one[4] for one in which) / len(which))

    check(found.whole, rows)
    assert len(found.corpora) == 2
    for number, name in samples.names.items():
        check(found.corpora[name], [one for one in rows if one[1] == number])
    assert list(found.positions) == [(0, 16), (16, 32)]
    for (start, stop), figures in found.positions.items():
        check(figures, [one for one in rows if start <= one[2] < stop])


def test_masked_tokens_and_documents_apart(tmp_path):
    run = imported(tmp_path, mask_document_ends=True, reset_at_documents=True)
    opened = open_model(run, dtype=torch.float64)
    samples = held_out(opened.config, opened.tokenizer, None)
    nats = tokens = 0.0
    for number in samples.numbers:
        batch = MicroBatch(**samples.batch([number]))
        assert batch.cu_seqlens is not None
        nats += opened.chunk(batch, {}, None).loss.item() * batch.loss_mask.sum().item()
        tokens += batch.loss_mask.sum().item()
    found = evaluate(opened.chunk, samples, 4).whole
    assert tokens < len(samples.numbers) * 32
    assert (found.tokens, found.loss) == (tokens, pytest.approx(nats / tokens, rel=1e-9))


def test_bits_per_byte_of_a_tiny_text(run, tmp_path, capsys):
    """A text of one sample, by its letters: the end of the document has a loss and no bytes."""
    text = "the lazy dog jumps over a fox"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(text)
    opened = open_model(run, dtype=torch.float64)
    ids = [*opened.tokenizer.encode(text), opened.tokenizer.eod]
    data = [f"data.corpus=[{{kind: text, path: {tmp_path}/text}}]"]
    length = f"train.seq_length={len(ids) - 1}"
    assert main(["eval", str(run), "--device", "cpu", "--json", "--data", *data, length]) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = torch.tensor([ids])
    batch = MicroBatch(tokens, tokens, torch.ones(tokens.shape))
    with torch.no_grad():
        likely = opened.chunk.logits(batch, {}, None)[0].log_softmax(-1)
    nats = -sum(likely[place, label].item() for place, label in enumerate(ids[1:]))
    first = opened.tokenizer.decode(ids[:1])  # it is predicted from nothing, so not at all
    assert found["bytes"] == len(text) - len(first) and found["tokens"] == len(ids) - 1
    bits = nats / math.log(2) / (len(text) - len(first))
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_other_data_are_taken_whole(opened, tmp_path):
    (tmp_path / "new.txt").write_text("the lazy dog jumps over two cats " * 50)
    words = [f"data.corpus=[{{kind: text, path: {tmp_path}}}]", "train.seq_length=20"]
    config = with_data(opened.config, words)
    samples = other_data(config, opened.tokenizer, None)
    tokens = len(opened.tokenizer.encode((tmp_path / "new.txt").read_text())) + 1
    assert len(samples.numbers) == (tokens - 1) // 20 and samples.length == 20
    assert evaluate(opened.chunk, samples, 8).whole.tokens == 20 * len(samples.numbers)
    first = other_data(with_data(opened.config, words), opened.tokenizer, 2)
    assert len(first.numbers) == 8
    for words, told in ((["optimizer.lr=1"], "only keys of data"), (["a", "b"], "one config")):
        with pytest.raises(UserError, match=told):
            with_data(opened.config, words)


def test_nothing_held_out(opened):
    opened.config.train.eval_interval = 0
    with pytest.raises(UserError, match="nothing is held out: name other data with --data"):
        held_out(opened.config, opened.tokenizer, None)


def test_edges_double():
    assert position_edges(100) == [0, 16, 32, 64, 100]
    assert position_edges(16) == [0, 16] and position_edges(5) == [0, 5]


def test_the_command(run, tmp_path, capsys):
    assert main(["eval", str(run), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 0 and found["sequences"] == 3 * 4 and found["data"] == "held out"
    assert found["loss_error"] > 0 and len(found["corpora"]) == 2
    assert (
        main(
            ["eval", str(run), "--batches", "1", "--data", f"data.corpus.0.path={run.parent}/more"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "perplexity" in out and "positions 16 to 31" in out and "+-" in out
    assert main(["eval", str(run), "--batches", "0"]) == 2
    assert main(["eval", str(tmp_path)]) == 2


def record_of(run) -> dict[str, float]:
    """The last validation of a run, by the names that `attnres-train eval` has."""
    return {
        name: pytest.approx(column(run, f"validation_{name}")[-1], rel=1e-5)
        for name in ("loss", "bits_per_byte")
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_what_validation_in_training_came_to(tiny, capsys, ranks):
    run = tiny.train(f"whole-{ranks}x{ranks}", *grid(ranks, ranks), ranks=ranks)
    assert main(["eval", str(run), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in record_of(run)} == record_of(run)


GRIDS = {
    "one": (1, []),
    "PP2-DP2": (4, grid(2, 1)),
    "PP2-CP2": (4, [*grid(2, 1), "parallel.context_parallel_size=2"]),
}


@pytest.mark.parametrize(
    "place", ["one", "PP2-DP2", pytest.param("PP2-CP2", marks=pytest.mark.nightly)]
)
def test_validation_of_each_corpus_is_what_it_comes_to(tiny, capsys, place):
    """Two corpora at 3 to 1, samples of both in one micro-batch."""
    more = write_text(tiny.folder / "more", 16, 40, first=500)
    corpora = [(tiny.folder / "corpus", 3), (more, 1)]
    listed = ", ".join(f"{{kind: text, path: {path}, weight: {w}}}" for path, w in corpora)
    overrides = (f"data.corpus=[{listed}]", "train.stop_after=2", "train.eval_interval=2")
    ranks, layout = GRIDS[place]
    run = tiny.train(f"two-corpora-{place}", *overrides, *layout, ranks=ranks)
    assert main(["eval", str(run), "--device", "cpu", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    record = records(run)[-1]
    assert {key for key in record if key.startswith("validation_")} == {
        f"validation_{name}{end}"
        for name in ("loss", "bits_per_byte")
        for end in ("", "/corpus", "/more")
    }
    found = {"": whole}
    for name, figures in whole["corpora"].items():
        found["/more" if "/more)" in name else "/corpus"] = figures
    assert len(found) == 3
    for end, figures in found.items():
        for name in ("loss", "bits_per_byte"):
            assert record[f"validation_{name}{end}"] == pytest.approx(figures[name], rel=1e-5)
    parts = [(figures["tokens"], figures["loss"]) for end, figures in found.items() if end]
    mean = sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)
    assert record["validation_loss"] == pytest.approx(mean, rel=1e-5)
    assert abs(parts[0][1] - parts[1][1]) > 1e-3, "corpora of one loss tell nothing"
    # The line on the screen stays short.
    screen = tiny.screen(f"two-corpora-{place}", *overrides, *layout, ranks=ranks)
    assert "validation loss" in screen and "/more" not in screen.split("step 2/")[-1]


def test_a_checkpoint_of_before(tiny, tmp_path, capsys):
    """Format 1, without the record of data and the keys that came later."""
    run = tiny.train("whole-1x1", *grid(1, 1))
    config = read_manifest(run / "checkpoints" / step_name(STEPS)).extras["config"]
    log = {key: value for key, value in config["log"].items() if key != "samples"}
    config = {key: value for key, value in config.items() if key != "observe"} | {"log": log}
    save_old(tmp_path / "checkpoints", STEPS, saved_tensors(run, STEPS), {"config": config})
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")
    assert main(["eval", str(tmp_path), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in record_of(run)} == record_of(run)

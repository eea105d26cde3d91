from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from attnres_train.data.held_out import Cut, is_held_out
from attnres_train.data.samples import Source, build_indices, open_samples
from attnres_train.data.token_range import look_through
from attnres_train.errors import UserError
from tests.data.tiny import run_config, write_indexed

T = 16


def sources(folder: Path, weights: tuple[float, ...] = (1.0,), num_sequences=40) -> list[Source]:
    """Corpus c holds the ids [100 c, 100 c + 100), in sequences of 5 to 30 tokens."""
    rng = np.random.default_rng(3)
    made = []
    for number, weight in enumerate(weights):
        sequences = [
            (100 * number + rng.integers(0, 100, rng.integers(5, 30))).tolist()
            for _ in range(num_sequences)
        ]
        prefix = write_indexed(folder / f"corpus{number}", sequences)
        key = f"data.corpus.{number}"
        made.append(Source(key, f"indexed {prefix}", f"digest{number}", weight, [prefix]))
    return made


def configured(folder: Path, **changes):
    """Of a run that validates: a quarter is held out."""
    changes = {"train__eval_interval": 1, **changes}
    return run_config(folder, [{"kind": "indexed", "path": "unused"}], **changes)


def hashes(source: Source) -> np.ndarray:
    return look_through(source.prefixes[0], hashed=True)[2]


def held_out(source: Source) -> set[int]:
    return set(np.flatnonzero(is_held_out(hashes(source), 0.25)).tolist())


def opened(made: list[Source], folder: Path, split="train", num_samples=400, **changes):
    config = configured(folder, **changes)
    indices = folder / f"indices_{config.run.seed}"
    indices.mkdir(exist_ok=True)
    known = []
    for number, source in enumerate(made):
        file = indices / f"{number}.json"
        if not file.exists():
            summary, _ = build_indices(source, number, hashes(source), config, indices)
            file.write_text(json.dumps([summary.valid_tokens > 0, asdict(summary)["cut"]]))
        validates, cut = json.loads(file.read_text())
        known.append(replace(source, validates=validates, cut=Cut(**cut) if cut else None))
    return open_samples(known, split, num_samples, config, indices)


def rows(samples, start: int, stop: int) -> list[list[int]]:
    return [samples[i]["tokens"].tolist() for i in range(start, stop)]


def test_a_sample_is_a_window_of_the_training_tokens(tmp_path):
    (source,) = sources(tmp_path)
    samples = opened([source], tmp_path)
    train = sorted(set(range(40)) - held_out(source))
    low_level = samples.dataset.dataset
    stream = np.concatenate([low_level.get(int(i)) for i in samples.dataset.document_index])
    assert sorted(samples.dataset.document_index.tolist()) == train
    assert samples.samples_per_epoch == (len(stream) - 1) // T
    windows = {tuple(stream[i * T : i * T + T + 1]) for i in range(samples.samples_per_epoch)}
    seen = set()
    for i in range(samples.samples_per_epoch):
        sample = samples[i]
        assert sample["tokens"].shape == sample["labels"].shape == sample["loss_mask"].shape == (T,)
        assert sample["loss_mask"].min() == 1
        seen.add((*sample["tokens"].tolist(), sample["labels"][-1].item()))
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    assert seen == windows


def test_where_sequences_end_in_a_sample(tmp_path):
    """Against the ends in the whole stream of an epoch; windows of T tokens, in a random order."""
    made = sources(tmp_path)
    plain = opened(made, tmp_path)
    samples = opened(made, tmp_path, data__reset_at_documents=True)
    n, low_level = samples.samples_per_epoch, samples.dataset.dataset
    assert rows(samples, 0, 2 * n) == rows(plain, 0, 2 * n)
    assert "sequence_ends" not in plain[0]

    lengths = [low_level.length(int(i)) for i in samples.dataset.document_index]
    stream_ends = np.zeros(sum(lengths), bool)
    stream_ends[np.cumsum(lengths) - 1] = True
    for i in range(2 * n):
        _, place = samples.order(i)
        start = int(samples.dataset.shuffle_index[place]) * T
        assert samples[i]["sequence_ends"].tolist() == stream_ends[start : start + T].tolist()


def test_every_epoch_has_every_sample_once_in_another_order(tmp_path):
    samples = opened(sources(tmp_path), tmp_path)
    n = samples.samples_per_epoch
    epochs = [rows(samples, e * n, (e + 1) * n) for e in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.3), (1.0, 2.0, 5.0)])
def test_order_does_not_depend_on_the_length_of_the_run(tmp_path, weights):
    """GPTDataset's own order for 500 samples would differ from that for 30."""
    made = sources(tmp_path, weights)
    short = rows(opened(made, tmp_path, num_samples=30), 0, 30)
    changes = {"train__train_iters": 999, "train__global_batch_size": 64}
    long = rows(opened(made, tmp_path, num_samples=500, **changes), 0, 30)
    assert short == long


def test_order_depends_on_the_seed(tmp_path):
    made = sources(tmp_path, (1.0, 1.0))
    first = rows(opened(made, tmp_path), 0, 20)
    assert first == rows(opened(made, tmp_path), 0, 20)
    assert first != rows(opened(made, tmp_path, run__seed=7), 0, 20)


def test_the_validation_set_is_held_out_and_the_same_for_every_seed(tmp_path):
    made = sources(tmp_path, (1.0, 1.0))
    first = rows(opened(made, tmp_path, split="valid"), 0, 20)
    assert first == rows(opened(made, tmp_path, split="valid", run__seed=2**63), 0, 20)
    for number, source in enumerate(made):
        parts = {
            split: set(opened(made, tmp_path, split).datasets[number].dataset.document_index)
            for split in ("train", "valid")
        }
        assert parts["valid"] == held_out(source)
        assert parts["train"] == set(range(40)) - held_out(source)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 2.0, 5.0)])
def test_blends_keep_their_proportions_all_along(tmp_path, weights):
    samples = opened(sources(tmp_path, weights), tmp_path)
    counts = Counter()
    for i in range(400):
        sample = samples[i]
        corpus = int(sample["dataset_id"])
        assert (sample["tokens"] // 100 == corpus).all()
        counts[corpus] += 1
        for number, weight in enumerate(weights):
            assert abs(counts[number] - (i + 1) * weight / sum(weights)) <= len(weights)
    assert len(counts) == len(weights)


def test_each_corpus_of_a_blend_goes_through_its_epochs(tmp_path):
    """400 samples are several epochs of each; a corpus's samples come in its own order."""
    made = sources(tmp_path, (0.7, 0.3))
    blended = opened(made, tmp_path)
    for number, member in enumerate(blended.datasets):
        of_it = [i for i in range(400) if blended.dataset_index[i] == number]
        assert len(of_it) > 3 * member.samples_per_epoch
        taken = [blended[i]["tokens"].tolist() for i in of_it]
        assert taken == rows(member, 0, len(of_it))


def test_summary_counts_training_tokens(tmp_path):
    (source,) = sources(tmp_path)
    config = configured(tmp_path)
    summary, unigrams = build_indices(source, 0, hashes(source), config, tmp_path)
    assert unigrams.shape == (config.model.vocab_size,)
    assert unigrams.sum() == summary.train_tokens
    total = Path(source.prefixes[0] + ".bin").stat().st_size // 2
    assert summary.train_tokens + summary.valid_tokens == total
    assert summary.train_samples == (summary.train_tokens - 1) // T
    assert math.isclose(summary.valid_tokens / total, 0.25, abs_tol=0.1)
    assert (summary.documents, summary.held_out) == (40, len(held_out(source)))


def test_a_corpus_smaller_than_a_sample(tmp_path):
    prefix = write_indexed(tmp_path / "small", [[1] * 8, [2] * 8])
    source = Source("data.corpus.0", "indexed small", "d", 1.0, [prefix])
    with pytest.raises(UserError) as caught:
        build_indices(source, 0, hashes(source), configured(tmp_path), tmp_path)
    assert str(caught.value) == (
        "data.corpus.0 (indexed small) has 16 training tokens, too few for one sample of "
        "train.seq_length + 1 = 17: bring more text, or lower train.seq_length"
    )


def test_one_sample_is_enough(tmp_path):
    prefix = write_indexed(tmp_path / "exact", [list(range(17))])
    source = Source("data.corpus.0", "indexed exact", "d", 1.0, [prefix])
    samples = opened([source], tmp_path)
    assert samples.samples_per_epoch == 1
    assert rows(samples, 0, 3) == [list(range(16))] * 3


def test_damaged_indices(tmp_path):
    made = sources(tmp_path)
    opened(made, tmp_path)
    folder = tmp_path / "indices_1234"
    (file,) = folder.glob("*train-sample_index.npy")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"sample indices in {folder} are missing or damaged"):
        opened(made, tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="run `attnres-train data CONFIG` again"):
        opened(made, tmp_path)


def test_a_passage_is_lent(tmp_path):
    """Training and validation together see each token of the document once, none twice."""
    prefix = write_indexed(tmp_path / "one", [list(range(200))])
    source = Source("data.corpus.0", "indexed one", "d", 1.0, [prefix])
    train, valid = (opened([source], tmp_path, split) for split in ("train", "valid"))
    seen = {
        split: {token for row in rows(samples, 0, samples.samples_per_epoch) for token in row}
        for split, samples in (("train", train), ("valid", valid))
    }
    assert seen["train"] == set(range(9 * T)), "of the first 150 tokens, whole samples"
    assert seen["valid"] == set(range(150, 150 + 3 * T))
    assert train.samples_per_epoch == 149 // T


def test_a_corpus_that_does_not_validate_is_left_out_of_the_blend(tmp_path):
    large, small = sources(tmp_path, (0.7, 0.3))
    small = replace(small, prefixes=[write_indexed(tmp_path / "small", [[100] * 20])])
    valid = opened([large, small], tmp_path, "valid")
    assert all(max(row) < 100 for row in rows(valid, 0, 40))
    train = opened([large, small], tmp_path)
    assert sum(max(row) == 100 for row in rows(train, 0, 40)) == 12

"""The quickstart script, shortened by overrides: trains, stops, resumes, summarises; twice."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from attnres_train.observe.sinks import read_records

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").is_file(), reason="scripts/test.sh makes .venv"
)
def test_it_stops_resumes_and_reuses_what_exists(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    paragraphs = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
    documents = (json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs)
    corpus.write_text("".join(documents), encoding="utf-8")
    command = [
        str(ROOT / "scripts" / "quickstart.sh"),
        f"run.dir={tmp_path}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"data.corpus=[{{kind: jsonl, path: {corpus}}}]",
        "data.split=[0.5, 0.5]",
        "data.tokenizer.vocab_size=300",
        "train.seq_length=32",
        "train.global_batch_size=4",
        "train.train_iters=4",
        "train.stop_after=2",
    ]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=600) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert "stopped after step 2, saved" in first.stdout
    assert "resumed from" in first.stdout
    for label in ("loss", "validation", "unigram", "speed", "sent", "checkpoint", "loss plot"):
        assert f"{label}  " in first.stdout
    run = tmp_path / "quickstart"
    assert [r["step"] for r in read_records(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (run / "loss.png").is_file()

    assert second.returncode == 0, second.stderr
    assert "step 3/4" not in second.stdout  # nothing was left to train
    assert [r["step"] for r in read_records(run / "metrics.jsonl")] == [1, 2, 3, 4]

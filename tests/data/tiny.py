"""Small corpora and configurations for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from attnres_train.config.schema import RunConfig
from attnres_train.data.indexed import HEADER, MAGIC

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "two",
    "cats",
]


def sentence(number: int, length: int = 12) -> str:
    """The same words for the same number."""
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, size=length))


def write_text(folder: Path, num_files: int, lines: int = 8, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(num_files):
        numbers = range(first + file * lines, first + (file + 1) * lines)
        text = "".join(sentence(number) + "\n" for number in numbers)
        (folder / f"{file:03d}.txt").write_text(text)
    return folder


def write_jsonl(path: Path, texts: list[str | None], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def write_indexed(prefix: Path, sequences: list[list[int]], dtype: type = np.uint16) -> str:
    """A .bin/.idx pair as Megatron's preprocess_data leaves it, written here by hand."""
    arrays = [np.array(sequence, dtype) for sequence in sequences]
    lengths = np.array([len(array) for array in arrays], np.int32)
    offsets = np.concatenate([[0], np.cumsum([array.nbytes for array in arrays])])[:-1]
    marks = np.arange(len(arrays) + 1)
    code = {np.uint16: 8, np.int32: 4, np.float32: 7}[dtype]
    header = HEADER.pack(MAGIC, 1, code, len(arrays), len(marks))
    body = [lengths.tobytes(), offsets.astype(np.int64).tobytes(), marks.astype(np.int64).tobytes()]
    Path(f"{prefix}.idx").write_bytes(b"".join([header, *body]))
    Path(f"{prefix}.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    return str(prefix)


def run_config(
    cache: Path, corpora: list[dict], tokenizer: dict | None = None, **changes
) -> RunConfig:
    """A run of 4 x 10 samples of 16 tokens; ``changes`` are dotted keys with __ for the dot."""
    config = RunConfig.model_validate(
        {
            "model": {"hidden_size": 32, "num_layers": 2, "vocab_size": 512},
            "train": {"train_iters": 10, "seq_length": 16, "global_batch_size": 4},
            "data": {
                "corpus": corpora,
                "tokenizer": tokenizer or {"vocab_size": 300},
                "split": (0.75, 0.25),
                "cache_dir": str(cache),
            },
        }
    )
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    return config


def text_corpus(path: Path, **more) -> dict:
    return {"kind": "text", "path": str(path), **more}


def cached(cache: Path) -> dict[Path, int]:
    """When each file of the cache was written."""
    files = [file for file in cache.rglob("*") if file.is_file()]
    return {file: file.stat().st_mtime_ns for file in files if file.name != "lock"}

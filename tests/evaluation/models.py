"""A model with random weights and a tokenizer, as a run that has been imported: no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnres_train.__main__ import main
from attnres_train.data.tokenizers.hugging_face import train_bpe
from tests.checkpoint.released import RUN, tensors, write_released, write_run
from tests.data.tiny import sentence, write_text

BLOCK = {"residual": {"kind": "block", "block_size": 4}}


def imported(folder: Path, **data: Any) -> Path:
    """The run folder of a model on two corpora; ``data`` changes the data section."""
    train_bpe((sentence(number) for number in range(50)), 300, folder / "tokenizer.json")
    source = write_released(folder / "source", tensors(2), attn_res_block_size=2)
    run = write_run(
        folder,
        model=dict(BLOCK),
        train=RUN["train"] | {"eval_interval": 1, "eval_iters": 3, "global_batch_size": 4},
        data=RUN["data"]
        | {"tokenizer": {"kind": "file", "path": str(folder / "tokenizer.json")}}
        | data,
    )
    more = write_text(folder / "more", 30, 6, first=900)
    texts = [str(folder / "corpus"), str(more)]
    corpora = ", ".join(f"{{kind: text, path: {path}}}" for path in texts)
    assert main(["import", str(source), str(run), f"data.corpus=[{corpora}]"]) == 0
    return folder / "r"

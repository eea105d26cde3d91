"""A run's tokenizer as files that transformers opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from attnres_train.data.tokenizers.hugging_face import FILE, TokenizerJson
from attnres_train.data.tokenizers.sentence_piece import SentencePiece
from attnres_train.data.tokenizers.tokenizer import Tokenizer

_CONFIG = "tokenizer_config.json"
_PIECES = "tokenizer.model"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> list[str]:
    """Write the files of ``tokenizer``, of a model trained on ``context_length`` tokens, into
    ``folder``. Returns what is to be told of it.

    A `tokenizer.json` opens by itself, and a rank file is written as one. Of a SentencePiece model
    the file is there, for whatever reads it.
    """
    path = tokenizer.path
    if path is None:
        return [f"no tokenizer files: data.tokenizer.kind {tokenizer.kind.kind} has none"]
    if isinstance(tokenizer.kind, TokenizerJson):
        shutil.copyfile(path, folder / FILE)
    else:
        try:
            (folder / FILE).write_text(tokenizer.tokenizer_json(), encoding="utf-8")
        except ValueError as error:
            name = _PIECES if isinstance(tokenizer.kind, SentencePiece) else path.name
            shutil.copyfile(path, folder / name)
            why = f"transformers does not open it by itself: {error}"
            return [f"{name} is data.tokenizer's file, and {why}"]
    end = tokenizer.decode([tokenizer.eod])
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / _CONFIG).write_text(text, encoding="utf-8")
    return []

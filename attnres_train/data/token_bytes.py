"""How many bytes of text a token stands for: what a loss in bits per byte is divided by.

Bits per byte are the nats of the tokens that count, over ln 2, over the bytes in UTF-8 of the text
that those tokens stand for. Unlike a loss per token they compare models whatever their tokenizers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError


def token_bytes(tokenizer: Tokenizer, vocab_size: int, mean: float | None) -> np.ndarray | None:
    """Bytes of each of ``vocab_size`` ids, float32; 0 for ids without text: special tokens, the end
    of a document, ids that the tokenizer does not have.

    Of a tokenizer whose tokens are bytes of the text, one after another (byte-level BPE, rank
    files), they are exact: a document that is cut counts as far as it goes. Of others, which may
    have changed the text before they cut it, every token counts for ``mean``, the bytes of the
    corpora by their tokens when they were tokenised; None where that is not known.
    """
    found = np.zeros(vocab_size, np.float32)
    exact = tokenizer.token_bytes
    if exact is not None:
        found[: len(exact)] = exact
    elif mean is None:
        return None
    else:
        found[: tokenizer.vocab_size] = mean
    found[tokenizer.eod] = 0
    return found


def read_token_bytes(path: str | Path) -> np.ndarray:
    """The table that was saved in ``path``, float64 [vocab_size]. Raises UserError where it cannot
    be read."""
    try:
        return np.load(path).astype(np.float64)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}, the bytes of tokens, is missing or damaged ({error}): remove its folder and "
            "run `attnres-train data CONFIG` again"
        ) from error

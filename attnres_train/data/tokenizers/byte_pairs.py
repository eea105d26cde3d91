"""A tiktoken rank file as a `tokenizer.json`, which transformers opens."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend


def as_tokenizer_json(
    ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]
) -> Backend:
    """The tokenizer that encodes as tiktoken does with ``ranks``, token to id, in what ``pattern``
    finds; ``special_tokens`` are names with their ids. Raises ValueError where the library does
    not take the expression.

    tiktoken joins whichever neighbours make up the token of the lowest rank: so each way to cut a
    token in two tokens is a merge, in the order of what it gives. Special tokens that lie behind a
    gap in the ids keep theirs.
    """
    names = {token: _name(token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=lambda token: ranks[token])
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {name: ranks[token] for token, name in names.items()} | dict(special_tokens)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizers does not take {pattern!r}: {error}") from error
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_characters])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in special_tokens])
    return backend


def _characters() -> list[str]:
    """The character of each byte in a vocabulary of GPT-2's kind (openai/gpt-2, encoder.py): bytes
    that print in Latin-1 are themselves, the others follow from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return [chr(0x100 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]


_CHARACTERS = _characters()


def _name(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)

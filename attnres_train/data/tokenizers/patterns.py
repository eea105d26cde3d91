"""How families of models split text before merging, and which special tokens follow their ranks: a
rank file says neither."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

END_OF_DOCUMENT = "<|endoftext|>"


@dataclass(frozen=True)
class Family:
    """What a name in ``data.tokenizer.pattern`` stands for."""

    expression: str
    """Regular expression: what it finds is merged, each by itself."""
    num_ranks: int | None = None
    """Ranks of the family's file; None: any number."""
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    """Name to id; {}: `END_OF_DOCUMENT` as the first id after the ranks."""
    eod: str = END_OF_DOCUMENT


# As in tiktoken (github.com/openai/tiktoken, tiktoken_ext/openai_public.py: r50k_base and
# cl100k_base; cl100k in its older form, without possessive quantifiers, which splits alike).
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K_TOKENS = {
    END_OF_DOCUMENT: 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}

# moonshotai/Kimi-Linear-48B-A3B-Instruct on Hugging Face: tokenization_kimi.py (revision 919416f)
# for the expression (`pat_str`), the names of reserved tokens and `[EOS]` as `eos_token`;
# config.json for vocab_size 163840 and eos_token_id 163586, which ends a chat's turn, not a
# document. Han is split off, contractions go with their word, digits by three.
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_KIMI = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_KIMI_RANKS, _KIMI_VOCABULARY = 163584, 163840
# tokenizer_config.json, `added_tokens_decoder`, of Kimi-K2-Instruct, whose rank file is the same.
# The released code also reserves 163840 and 163841, for which the model has no embedding.
_KIMI_NAMES = {
    163584: "[BOS]",
    163585: "[EOS]",
    163586: "<|im_end|>",
    163587: "<|im_user|>",
    163588: "<|im_assistant|>",
    163590: "<|start_header_id|>",
    163591: "<|end_header_id|>",
    163593: "[EOT]",
    163594: "<|im_system|>",
    163595: "<|tool_calls_section_begin|>",
    163596: "<|tool_calls_section_end|>",
    163597: "<|tool_call_begin|>",
    163598: "<|tool_call_argument_begin|>",
    163599: "<|tool_call_end|>",
    163601: "<|im_middle|>",
    163838: "[UNK]",
    163839: "[PAD]",
}
_KIMI_TOKENS = {
    _KIMI_NAMES.get(number, f"<|reserved_token_{number}|>"): number
    for number in range(_KIMI_RANKS, _KIMI_VOCABULARY)
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(_GPT2),
    "cl100k": Family(_CL100K, 100256, _CL100K_TOKENS),
    "kimi": Family(_KIMI, _KIMI_RANKS, _KIMI_TOKENS, eod="[EOS]"),
}


def family(pattern: str | None) -> Family:
    """What ``data.tokenizer.pattern`` stands for: a name, a regular expression or nothing."""
    return FAMILIES["gpt2"] if pattern is None else FAMILIES.get(pattern) or Family(pattern)


def pattern_problems(key: str, pattern: str | None) -> Iterator[str]:
    """What speaks against ``pattern``, as far as it is known without tiktoken."""
    names = ", ".join(FAMILIES)
    if pattern == "":
        yield f"{key} is empty: name one ({names}), or a regular expression"
    elif pattern and pattern not in FAMILIES and pattern.replace("-", "_").isidentifier():
        # As an expression it would find that word and drop all other text.
        near = difflib.get_close_matches(pattern.lower(), FAMILIES, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        yield f"{key} is {pattern!r}: neither a name ({names}) nor a regular expression{meant}"

"""Tokenizers: one per kind that `data.tokenizer.kind` may name."""

"""Corpora, tokenizer, token shards, samples."""

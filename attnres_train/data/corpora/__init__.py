"""Corpora: a reader per kind that `data.corpus.*.kind` may name."""

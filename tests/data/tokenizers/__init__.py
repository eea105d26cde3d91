"""Tests of the kinds of tokenizer."""

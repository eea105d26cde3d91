"""Tests of the kinds of corpus."""

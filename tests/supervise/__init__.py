"""Tests of what watches over a run."""

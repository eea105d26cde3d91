"""Tests of depth attention."""

"""Tests of Kimi Delta Attention."""

"""Tests of what is known before step 1."""

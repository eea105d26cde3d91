"""Tests of the mixture of experts."""

"""Tests of the residual stream."""

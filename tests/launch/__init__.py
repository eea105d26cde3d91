"""Tests of the launcher and the launch scripts."""

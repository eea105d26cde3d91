"""Metrics, sinks and progress."""

"""Observers of a run: console, sinks, plot, and the base of the user's own."""

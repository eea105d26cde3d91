"""The loop, the state of a run, and what becomes of steps that went wrong."""

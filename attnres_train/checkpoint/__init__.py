"""Layout-free checkpoints."""

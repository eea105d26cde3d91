"""Tools above the trainer."""

"""Muon and AdamW, parameter groups, learning-rate schedules."""

"""Errors that are the user's to fix: the command line prints their text alone, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message names the key, file or rank concerned and what to do about it."""

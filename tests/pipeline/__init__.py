"""Tests of pipeline planning and transport."""

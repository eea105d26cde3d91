"""Tests of attnres_train.model."""

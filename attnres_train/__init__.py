"""Pretraining of language models with Attention Residuals under interleaved pipelines."""

__version__ = "0.1.0"

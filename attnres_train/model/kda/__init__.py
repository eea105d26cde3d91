"""Kimi Delta Attention: operator, chunked form, layer, short convolution, fla's kernels."""

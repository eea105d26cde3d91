"""Depth attention: which implementation, PyTorch functions, Triton kernels, fla's, shared reads."""

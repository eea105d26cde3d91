"""Mixture of experts: router, experts, permutation and grouped matmul."""

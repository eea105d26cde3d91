"""Tensors in buckets."""

from __future__ import annotations

import torch

from attnres_train.parallel import gradients


def test_buckets_hold_one_dtype_and_no_more_than_their_size():
    half = gradients.BUCKET_ELEMENTS // 2
    sizes = [(half, torch.float32), (half, torch.float32), (1, torch.float32), (7, torch.bfloat16)]
    sizes += [(3 * half, torch.float32), (1, torch.float32)]
    tensors = [torch.empty(n, dtype=dtype, device="meta") for n, dtype in sizes]
    buckets = list(gradients.in_buckets(tensors))
    assert [len(bucket) for bucket in buckets] == [2, 1, 1, 1, 1]
    assert [tensor for bucket in buckets for tensor in bucket] == tensors

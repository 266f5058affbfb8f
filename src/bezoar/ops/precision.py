"""Computing in full precision with a model of half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers of 16 bits are float32 inside, and of their own type again afterwards.

    Small steps of a weight vanish in 16 bits.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in _HALF]
    types = [t.dtype for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, kind in zip(tensors, types, strict=True):
            tensor.data = tensor.data.to(kind)
            tensor.grad = None

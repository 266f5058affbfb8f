"""The orthonormal discrete cosine transform (DCT-II) as a matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(size: int) -> Tensor:
    """``(size, size)`` float64 D with ``D D^T = 1``: coefficients of a block are ``D x D^T``, row 0 is the mean."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    matrix = torch.cos(math.pi * (2 * columns.double() + 1) * rows.double() / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def inverse_dct(coefficients: Tensor) -> Tensor:
    """``(..., h, w)`` values of ``(..., h, w)`` coefficients."""
    height, width = coefficients.shape[-2:]
    return dct_matrix(height).to(coefficients).T @ coefficients @ dct_matrix(width).to(coefficients)

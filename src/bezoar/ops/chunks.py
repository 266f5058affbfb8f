"""Labels in chunks that fit into memory."""

from __future__ import annotations


def label_chunks(labels: list[int], pixels: int, bound: int) -> list[list[int]]:
    """Labels in chunks, at least one in each.

    Args:
        labels: All of them.
        pixels: Pixels of one label's batch.
        bound: Most pixels of a chunk.
    """
    size = max(1, bound // max(1, pixels))
    return [labels[at : at + size] for at in range(0, len(labels), size)]

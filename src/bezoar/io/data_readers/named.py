"""Data sets by name, from the cache that ``bezoar data get`` fills."""

from __future__ import annotations

from bezoar.io.data_readers._base import Source, Wanted
from bezoar.io.data_readers.memory import array_pictures, as_labels
from bezoar.io.datasets import NamedData, read


class NamedReader:
    """One part of a cached data set."""

    def claims(self, source: object) -> bool:
        """Whether it was named."""
        return isinstance(source, NamedData)

    def open(self, source: NamedData, wanted: Wanted) -> Source:  # noqa: ARG002 - part of the interface
        """Check the cached file and read the part."""
        keys = (f"{source.part}_x", f"{source.part}_y")
        x, y = read(source.data_set, keys).values()
        return Source(
            path=str(source),
            format="named",
            labels=as_labels(y),
            names=source.data_set.classes,
            pictures=array_pictures(x),
            named=True,
        )

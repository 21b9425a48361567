"""Which pictures a list speaks of, where no path of its millions is kept in memory."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from mige.data.records import Record, RecordList


def parts_of(record: Record) -> Iterator[tuple[str, str]]:
    """The path and the role of each of a record's pictures."""
    yield record.target, "target"
    for path in record.entities:
        yield path, "entity"
    if record.source is not None:
        yield record.source, "source"


def key_of(path: str) -> int:
    """A picture's number of 64 bits: its remainder by the number of shards is its shard."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class References:
    """Every mention of a picture in a list, n in all: of millions no path is kept.

    Attributes:
        keys: uint64 [n], `key_of` the paths.
        records: int64 [n], indices of the records.
        places: int16 [n], where in the records' ``paths``.
    """

    keys: np.ndarray
    records: np.ndarray
    places: np.ndarray

    @classmethod
    def of_list(cls, records: RecordList, which: Iterable[int]) -> "References":
        """Those of some records, in order."""
        keys, indices, places = array("Q"), array("q"), array("h")
        which = list(which) if not isinstance(which, np.ndarray) else which
        for index in tqdm(which, "paths", unit=" records", disable=len(which) < 1000):
            for place, path in enumerate(records[index].paths):
                keys.append(key_of(path))
                indices.append(index)
                places.append(place)
        return cls(*map(np.asarray, (keys, indices, places)))

    def __len__(self) -> int:
        return len(self.keys)

    def by_shard(self, shards: int) -> Iterator[tuple[int, "References"]]:
        """Each shard with the references that are in it, in order; without the empty ones."""
        of = (self.keys % np.uint64(shards)).astype(np.int64)
        order = np.argsort(of, kind="stable")
        starts = np.searchsorted(of[order], np.arange(shards + 1))
        for shard in range(shards):
            if starts[shard] < starts[shard + 1]:
                yield shard, self.select(order[starts[shard] : starts[shard + 1]])

    def without(self, names: Iterable[str]) -> "References":
        """Those of pictures that are not among these."""
        there = np.fromiter(map(key_of, names), dtype=np.uint64)
        return self.select(~np.isin(self.keys, there))

    def once(self) -> "References":
        """The first of each picture."""
        return self.select(np.sort(np.unique(self.keys, return_index=True)[1]))

    def select(self, which: np.ndarray) -> "References":
        """Some of them."""
        return References(self.keys[which], self.records[which], self.places[which])

    def paths(self, records: RecordList) -> list[str]:
        """Their paths, read out of the list again."""
        return [
            records[int(index)].paths[place]
            for index, place in zip(self.records, self.places, strict=True)
        ]

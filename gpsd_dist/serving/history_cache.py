"""Keeps keys and values of encoded histories, least recently used first to go.

Keys and values of a token depend on the tokens up to it alone; in HSTU, on their times and that of the next one too,
which are columns of a history there. So what is kept under the hash of a whole prefix is exact for every history that
begins with it, of any user, at any time. When a full window slides, its first token changes, and with it every hash:
nothing stale is found.

Shape letters: L layers, H heads, W tokens, A channels of a head.
"""

import collections
import hashlib
import threading
import typing

import numpy as np
import torch

from gpsd_dist.features import Values

MAX_NEW_EVENTS = 8  # untuned: more events since the last visit are encoded with the whole history


class Encoded(typing.NamedTuple):
    """Holds what candidates attend to: [L, 1, H, W, A] each."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Counts the bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def first(self, num_tokens: int) -> "Encoded":
        """Copies the first tokens, so that the others can be freed."""
        return Encoded(*(part[..., :num_tokens, :].clone() for part in self))


class HistoryCache:
    """Maps hashes of prefixes to what is encoded of them. Belongs to one version of an artefact; safe for threads."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.hits = self.extended = self.misses = self.num_bytes = 0
        """Histories found whole, found but for their last events, not found; bytes held."""
        self._entries: collections.OrderedDict[bytes, Encoded] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, columns: list[Values], length: int) -> tuple[int, Encoded | None]:
        """Finds the longest known prefix of a history of `length` events: (its length, what is kept of it)."""
        with self._lock:
            for num_new in range(min(length, MAX_NEW_EVENTS + 1)):
                key = prefix_hash(columns, length - num_new)
                if (found := self._entries.get(key)) is not None:
                    self._entries.move_to_end(key)
                    self.hits, self.extended = self.hits + (not num_new), self.extended + bool(num_new)
                    return length - num_new, found
            self.misses += length > 0
        return 0, None

    def put(self, columns: list[Values], length: int, encoded: Encoded) -> None:
        """Keeps a history; forgets others until all fit."""
        if encoded.num_bytes > self.max_bytes or not length:
            return
        key = prefix_hash(columns, length)
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = encoded
            self.num_bytes += encoded.num_bytes
            while self.num_bytes > self.max_bytes:
                _, forgotten = self._entries.popitem(last=False)
                self.num_bytes -= forgotten.num_bytes


def prefix_hash(columns: list[Values], length: int) -> bytes:
    """Hashes the first `length` events of a history: every feature of each, in the order that an artefact has them."""
    digest = hashlib.blake2b(digest_size=16)
    for values in columns:
        if isinstance(values, tuple):
            offsets = values[1][: length + 1] - values[1][0]
            digest.update(offsets.tobytes())
            values, length_of = values[0], int(offsets[-1])
        else:
            length_of = length
        digest.update(np.ascontiguousarray(values[:length_of]).tobytes())
    return digest.digest()

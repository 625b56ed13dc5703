"""A cache of the leader's shared memory that a worker keeps mapped for later runs."""

from __future__ import annotations

from collections import OrderedDict

from drp.protocol.handles import Handle
from drp.protocol.memory import MAX_RETAINED_NBYTES, SharedMemory

MAX_ENTRIES = 4
"""Pieces of memory that stay mapped."""


class SharedMemoryCache:
    """Opens memory, and keeps the most recently used memory open."""

    def __init__(self, max_nbytes: int = MAX_RETAINED_NBYTES) -> None:
        self._max_nbytes = max_nbytes
        self._kept: OrderedDict[int, SharedMemory] = OrderedDict()

    def open(self, handle: Handle, number: int) -> SharedMemory:
        """Return memory of the leader, by its number; memory with the number 0 is not cached.

        Raises ProtocolError if it does not match its handle.
        """
        memory = self._kept.pop(number, None)
        if memory is None or memory.nbytes != handle.nbytes:
            memory = SharedMemory.open(handle)
        if number:
            self._kept[number] = memory
            while len(self._kept) > MAX_ENTRIES or sum(each.nbytes for each in self._kept.values()) > self._max_nbytes:
                self._kept.popitem(last=False)
        return memory

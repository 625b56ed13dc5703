"""A pool of shared memory: that of finished runs is reused, already allocated and mapped."""

from __future__ import annotations

from drp.protocol.memory import SharedMemory

MAX_FREE_NBYTES = 1 << 28
"""Bytes that are kept at most; what was given back first goes first."""
MANY = 8
"""Pieces that are kept at most: each takes two descriptors of this process, its own and its mapping's."""


class BufferPool:
    """For one thread. Memory comes back when it is closed, unless somebody may still write to it."""

    def __init__(self, max_nbytes: int = MAX_FREE_NBYTES) -> None:
        self._max_nbytes = max_nbytes
        self._free: list[SharedMemory] = []
        self._closed = False

    @property
    def nbytes(self) -> int:
        """How much is kept now."""
        return sum(memory.nbytes for memory in self._free)

    def acquire(self, nbytes: int) -> SharedMemory:
        """Return memory at least so long, and less than four times that or a page; what is in it is anybody's guess."""
        fits = [memory for memory in self._free if nbytes <= memory.nbytes < 4 * max(nbytes, 4096)]
        if not fits:
            try:
                return SharedMemory.create(nbytes, self._keep)
            except MemoryError:  # It may be what is kept here that takes the memory, or the descriptors.
                if not self._free:
                    raise
                self.clear()
                return SharedMemory.create(nbytes, self._keep)
        best = min(fits, key=lambda memory: memory.nbytes)
        self._free.remove(best)
        return best

    def close(self) -> None:
        """Let go of all of it, and of what comes back from now on."""
        self._closed = True
        self.clear()

    def clear(self) -> None:
        """Let go of what is kept now."""
        while self._free:
            self._free.pop().close(reuse=False)

    def _keep(self, memory: SharedMemory) -> bool:
        if self._closed or memory.nbytes > self._max_nbytes:
            return False
        self._free.append(memory)
        while self.nbytes > self._max_nbytes or len(self._free) > MANY:
            self._free.pop(0).close(reuse=False)
        return True

"""A pool of shared memory, which reuses the memory of finished runs, already allocated and mapped."""

from __future__ import annotations

from drp.protocol.memory import SharedMemory

MAX_FREE_NBYTES = 1 << 28
"""Maximum number of bytes kept in the pool; the buffers released first are freed first."""
MAX_FREE_BUFFERS = 8
"""Maximum number of buffers kept in the pool. Each uses two descriptors of this process, its own and its mapping's."""


class BufferPool:
    """Shared memory for reuse, for one thread only.

    A buffer returns to the pool when it is closed, unless a worker may still write to it.
    """

    def __init__(self, max_nbytes: int = MAX_FREE_NBYTES) -> None:
        self._max_nbytes = max_nbytes
        self.free: list[SharedMemory] = []
        self._closed = False

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self.free)

    def acquire(self, nbytes: int) -> SharedMemory:
        """Return uninitialized memory of at least `nbytes` bytes.

        Reused memory is smaller than four times that, or than four pages.
        """
        fits = [memory for memory in self.free if nbytes <= memory.nbytes < 4 * max(nbytes, 4096)]
        if not fits:
            try:
                return SharedMemory.create(nbytes, self._keep)
            except MemoryError:  # The pool itself may be using the memory or the descriptors.
                if not self.free:
                    raise
                self.clear()
                return SharedMemory.create(nbytes, self._keep)
        best = min(fits, key=lambda memory: memory.nbytes)
        self.free.remove(best)
        return best

    def close(self) -> None:
        """Free all buffers, and from now on free buffers that are released."""
        self._closed = True
        self.clear()

    def clear(self) -> None:
        while self.free:
            self.free.pop().close(reuse=False)

    def _keep(self, memory: SharedMemory) -> bool:
        if self._closed or memory.nbytes > self._max_nbytes:
            return False
        self.free.append(memory)
        while self.nbytes > self._max_nbytes or len(self.free) > MAX_FREE_BUFFERS:
            self.free.pop(0).close(reuse=False)
        return True

"""What can go wrong with workers."""


class WorkerError(RuntimeError):
    """A worker could not start, raised, died or did not answer; the message says which, how, and its last words."""

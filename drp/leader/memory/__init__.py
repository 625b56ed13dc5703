"""Memory: where runs are placed, reused buffers, and the leader's host stream."""

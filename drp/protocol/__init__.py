"""All that leader and workers know of each other: messages, their bytes, the sockets, shared memory."""

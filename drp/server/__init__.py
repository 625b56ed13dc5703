"""The server: a leader behind a socket, run by `drp serve`. Its protocol is specified in drp/protocol/SPEC.md."""

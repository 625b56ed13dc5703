"""Server: a leader behind a socket. `drp serve` runs it; drp/protocol/SPEC.md says what it speaks."""

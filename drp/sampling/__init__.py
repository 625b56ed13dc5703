"""The mathematics: tensors in, tensors out. No process, no socket, no device policy."""

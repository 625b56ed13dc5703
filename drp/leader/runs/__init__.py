"""Runs: the state of synchronous and asynchronous runs and of evaluation sessions."""

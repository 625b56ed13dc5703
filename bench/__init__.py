"""Benches: one question a file. `python -m bench` asks them in turn."""

"""Supervision: worker processes, their start-up, health checks and replacement."""

"""Scheduling: which worker evaluates which draft, and the policies that decide it."""

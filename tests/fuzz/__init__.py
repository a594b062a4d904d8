"""Fuzzing of what reads bytes from outside: `python -m tests.fuzz TARGET --seconds 60`."""

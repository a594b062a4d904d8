"""A faithful OpenRouter, with faults on demand and its own books.

`library` is its model list, `generation` decides what a model says and what that costs, `script` turns it into a timed sequence
of bytes, `faults` changes that sequence, `books` keeps the bill of everything served, `server` speaks HTTP.
A new fault is one function in `faults`.
"""

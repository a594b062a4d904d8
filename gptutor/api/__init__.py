"""The public API: what clients call."""

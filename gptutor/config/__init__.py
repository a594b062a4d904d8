"""The settings: their schema, their files, and the messages about mistakes in them."""

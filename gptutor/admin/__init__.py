"""The administrators' API: HTTP for operators and their programs, on a listener that is never public."""

"""Everything that knows HTTP from the caller's side."""

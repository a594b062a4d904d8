"""Everything that knows roubles. No HTTP here."""

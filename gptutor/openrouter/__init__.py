"""Everything that knows OpenRouter. No money and no database here."""

"""GPTutor: a prepaid, exactly billed OpenAI-compatible gateway in front of OpenRouter."""

__version__ = "0.2.0"

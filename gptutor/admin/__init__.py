"""The administrator's listener: HTTP for those who run the service, never on the public side."""

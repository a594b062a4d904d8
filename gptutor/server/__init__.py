"""Running the service: processes, listeners, start and stop."""

"""What `gptutor doctor` looks at: an installation, with the service running or without."""

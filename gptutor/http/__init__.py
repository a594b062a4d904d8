"""What the API and the admin API both need to speak HTTP."""

"""Clients of external services: sign-in with VK, payments with YooKassa."""

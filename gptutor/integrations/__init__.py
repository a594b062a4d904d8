"""Services of others: VK's sign-in, YooKassa's payments."""

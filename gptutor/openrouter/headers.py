"""The headers that pass the gateway, in both directions; all others end here.

They change OpenRouter's response, or describe it, and say nothing about who the client is: cookies, addresses, trace ids and
hop-by-hop headers are not among them. The guide lists them, on its pages about the request and the response.
"""

FORWARDED_HEADERS = (
    "X-Session-Id",  # keeps a conversation at one provider, whose prompt cache makes it cheaper
    "X-OpenRouter-Cache",  # OpenRouter's response cache; its key includes the body, and so the pseudonym of the account
    "X-OpenRouter-Cache-TTL",
    "X-OpenRouter-Cache-Clear",
    "X-OpenRouter-Metadata",
    "x-anthropic-beta",
)
"""Of a client's request, to OpenRouter."""

# OpenRouter is told not to compress, but if it does, the bytes are passed as they are, and the client must know.
RETURNED_HEADERS = (
    "Content-Type",
    "Content-Encoding",
    "X-Generation-Id",
    "X-OpenRouter-Cache-Status",
    "X-OpenRouter-Cache-Age",
    "X-OpenRouter-Cache-TTL",
    "X-Provider-Name",
)
"""Of OpenRouter's response, to the client."""

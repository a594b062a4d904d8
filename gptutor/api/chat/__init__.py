"""`POST /v1/chat/completions`: the request, the exchange with OpenRouter, the purchase, the event stream."""

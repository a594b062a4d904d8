"""A simulator of OpenRouter's API, with exact bills of everything served and with faults on demand.

`model_library` is its model list, `response_content` what a model replies (for structured output with the help of `json_schema`),
and `tariff` the price. `generation` is a complete response with its usage, and `response_script` turns it into timed writes of
bytes. `faults` changes either of them. `billing_records` keeps the bill of every generation, and `server` speaks HTTP.

A new fault is one function: in `response_faults` if OpenRouter sends something else, in `transport_faults` if the same content is
sent in another way.
"""

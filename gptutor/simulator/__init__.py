"""A faithful OpenRouter, with faults on demand and its own books.

`library` is its model list, `speech` what a model says, `schema` how it fills in a form, `tariff` what is billed for it;
`generation` is a finished answer with its price, `script` turns it into timed steps of bytes, `faults` changes either, `books`
keeps the bill of everything served, `server` speaks HTTP. A new fault is one function: in `answer_faults` if OpenRouter says
something else, in `wire_faults` if the same comes in another way.
"""

"""`make month`: what an operator lives through in a month, on this machine, in a minute, and then an audit.

A release is installed from a clone below a folder that stands for /, and its own program serves under load: plain requests and
streams, on connections that are kept and on new ones. It is replaced, updated, taken back and forward again, loses its database,
its key at OpenRouter and the room on its disk, and is given a backup instead of its database. Its clients, OpenRouter's bills, the
receiver of its alerts and `gptutor verify` say how it went.

`installation` installs, `service` is the service as systemd would run it, `database` its PostgreSQL, `small_disk` the disk that is
filled, `load` the clients, `receiver` the webhook, `books` the comparison with the bills, `story` what happens.
`python -m tests.month --help` lists the options.
"""

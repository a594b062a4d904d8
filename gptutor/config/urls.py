"""Whether what an operator writes is an address: of PostgreSQL, or of HTTP. No I/O."""

import re
from urllib.parse import parse_qsl, urlsplit

DATABASE_HOST = re.compile(r"/.*|(?:\[[0-9A-Fa-f:.]+\]|[^/\[\]:@\s]+)(?::([^:]*))?")


def is_database(url: str) -> bool:
    """Whether a URL of PostgreSQL is one by asyncpg's reading, in which several hosts may stand, or none.

    A password with characters that mean something else moves the rest of the URL into a port, a path or a query: what could only
    have come there so is refused, before it is taken for the name of a host and printed.
    """
    try:
        parts = urlsplit(url)
        more = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        return False
    _, _, hosts = parts.netloc.rpartition("@")
    named = [DATABASE_HOST.fullmatch(host) for some in (hosts, more.get("host")) if some for host in some.split(",")]
    ports = [host[1] for host in named if host and host[1] is not None] + more.get("port", "1").split(",")
    return (
        url.lower().startswith(("postgresql://", "postgres://"))
        and parts.netloc.count("@") <= 1
        and all(named)
        and all(re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65_535 for port in ports)
        and not re.search(r"[@\[\]\s]", parts.path + parts.query)
        and not parts.fragment
        and not re.search(r"[\t\r\n]|\s\Z", url)  # urlsplit would leave them out
    )


def is_address(url: str, *, with_path: bool) -> bool:
    """Whether a URL of http or https names a host, a possible port, and no more than a path."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    more = parts.query or parts.fragment or (not with_path and parts.path.strip("/"))
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not more and url.isascii()

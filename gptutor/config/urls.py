"""Checks of the addresses in settings: URLs of PostgreSQL and of HTTP. No I/O."""

import re
from urllib.parse import parse_qsl, urlsplit

DATABASE_HOST = re.compile(r"/.*|(?:\[[0-9A-Fa-f:.]+\]|[^/\[\]:@\s]+)(?::([^:]*))?")


def is_database(url: str) -> bool:
    """Whether asyncpg reads the text as a URL of PostgreSQL, with one host, several or none.

    An unescaped special character in a password moves the rest of the URL into the port, the path or the query. Such URLs are
    rejected here, before a part of the password is taken for a host name and printed.
    """
    try:
        parts = urlsplit(url)
        more = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        return False
    _, _, hosts = parts.netloc.rpartition("@")
    matches = [DATABASE_HOST.fullmatch(host) for some in (hosts, more.get("host")) if some for host in some.split(",")]
    ports = [match[1] for match in matches if match and match[1] is not None] + more.get("port", "1").split(",")
    return (
        url.lower().startswith(("postgresql://", "postgres://"))
        and parts.netloc.count("@") <= 1
        and all(matches)
        and all(re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65_535 for port in ports)
        and not re.search(r"[@\[\]\s]", parts.path + parts.query)
        and not parts.fragment
        and not re.search(r"[\t\r\n]|\s\Z", url)  # urlsplit would drop these
    )


def is_address(url: str, *, with_path: bool) -> bool:
    """Whether the text is a URL of http or https with a host, perhaps a port, and nothing but a path after them."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    more = parts.query or parts.fragment or (not with_path and parts.path.strip("/"))
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not more and url.isascii()

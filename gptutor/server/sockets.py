"""The listening sockets that the master binds, and that all its workers share. A failure is a sentence for the operator."""

import contextlib
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

from gptutor.server.listener import BACKLOG, StartError, address_error, host_and_port

UNIX = "unix:"
UMASK = 0o117
"""Of a Unix socket: its owner and group may use it."""


def bind_all(addresses: Mapping[str, str], inherited: Mapping[str, socket.socket] | None = None) -> dict[str, socket.socket]:
    """Address → listening socket, for addresses of `tcp_address` and `unix_address`, each with the setting that it comes from.

    An inherited socket of the same address is used again; those that are not needed any more are closed. Raises StartError, and
    then the inherited ones are as they were.
    """
    before = inherited or {}
    bound: dict[str, socket.socket] = {}
    try:
        for address, setting in addresses.items():
            bound[address] = before.get(address) or bind(address, setting)
    except StartError:
        for address in bound.keys() - before.keys():
            close(address, bound[address])
        raise
    for address in before.keys() - addresses.keys():
        close(address, before[address])
    return bound


def tcp_address(host: str, port: int) -> str:
    return host_and_port(host, port)


def unix_address(path: str) -> str:
    return UNIX + path


def adopted(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


def bind(address: str, setting: str) -> socket.socket:
    """Raises StartError."""
    if address.startswith(UNIX):
        return _bind_unix(Path(address.removeprefix(UNIX)))
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, int(port)), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise address_error(host, int(port), error, setting) from error


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(UMASK)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StartError(f"Cannot listen on the socket {path}: {error.strerror or error}.") from error
    finally:
        os.umask(umask)
    return listener


def close(address: str, listener: socket.socket) -> None:
    listener.close()
    if address.startswith(UNIX):
        Path(address.removeprefix(UNIX)).unlink(missing_ok=True)

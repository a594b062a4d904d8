"""What the service tells systemd, by the protocol of sd_notify(3): datagrams to the socket that NOTIFY_SOCKET names.

Without that variable, nothing is sent. A manager that cannot be reached is no reason to stop serving.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SEND_S = 1.0
MESSAGES_PER_WATCHDOG = 4
"""How many messages are sent in the time after which systemd takes the service for hung."""


def is_present() -> bool:
    """Whether a service manager wants to be notified."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*lines: str) -> None:
    """Sends one message, such as `READY=1` and `STATUS=…`."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # the abstract name space
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(SEND_S)
        sender.sendto("\n".join(lines).encode(), address)


def notify_ready(status: str) -> None:
    notify("READY=1", f"STATUS={one_line(status)}")


def notify_reloading() -> None:
    """To be followed by `notify_ready`. The time lets systemd tell a reload that it asked for from an earlier one."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=Reloading: checking the settings")


def notify_stopping() -> None:
    notify("STOPPING=1", "STATUS=Stopping: running requests are finished and their charges are settled")


def notify_watchdog() -> None:
    notify("WATCHDOG=1")


def watchdog_s() -> float | None:
    """Without a message for so long, systemd takes the service for hung. None: it does not watch this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 1e6 or None
    except (KeyError, ValueError):
        return None


@asynccontextmanager
async def watched_event_loop() -> AsyncIterator[None]:
    """Meanwhile the messages of the watchdog are sent, as long as the event loop of this process runs."""
    within_s = watchdog_s()
    if within_s is None:
        yield
        return

    async def feed(interval_s: float) -> None:
        while True:
            notify_watchdog()
            await asyncio.sleep(interval_s)

    feeding = asyncio.get_running_loop().create_task(feed(within_s / MESSAGES_PER_WATCHDOG))
    try:
        yield
    finally:
        feeding.cancel()


def one_line(text: str) -> str:
    return " ".join(text.split())

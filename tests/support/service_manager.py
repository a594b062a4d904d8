"""What systemd hears from the service."""

import contextlib
import socket
from pathlib import Path


class ServiceManager:
    """The socket on which systemd would listen."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def read(self) -> list[str]:
        """All messages until now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.messages.append(self._socket.recv(4096).decode())
        return self.messages

    def count(self, start: str) -> int:
        return sum(message.startswith(start) for message in self.read())

    @property
    def status(self) -> str:
        """The last message that said the service is ready; empty before the first."""
        return next((message for message in reversed(self.read()) if message.startswith("READY=1")), "")

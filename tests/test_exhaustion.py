"""When the process runs out of file descriptors (row client-11)."""

import socket
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from gptutor.http.connection_limits import RESERVED_PART
from tests.support.service import start

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def closes(connection: socket.socket) -> bool:
    """Whether the service closes a connection that sends nothing, within a few seconds."""
    connection.settimeout(4)
    with suppress(OSError):
        return connection.recv(1) == b""
    return False


def test_without_free_descriptors_open_connections_are_served_and_the_service_recovers(tmp_path: Path) -> None:
    service = start(tmp_path, GPTUTOR_LOGS__STDOUT="false")
    process = psutil.Process(service.process.pid)
    address = (urlsplit(service.url).hostname, urlsplit(service.url).port)
    with ExitStack() as stack:
        early = stack.enter_context(socket.create_connection(address, timeout=10))
        early.sendall(HEALTH)
        assert early.recv(4096).startswith(b"HTTP/1.1 200")
        limit = process.num_fds() + 10
        _, hard = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (limit, hard))
        late = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(50)]
        time.sleep(1)
        assert process.num_fds() >= limit - limit // RESERVED_PART - 1  # the rest is for `/health`
        early.sendall(HEALTH)
        assert early.recv(4096).startswith(b"HTTP/1.1 200")
        for path, status in ((b"/health", b"200"), (b"/v1/models", b"503")):
            with socket.create_connection(address, timeout=10) as last:
                last.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
                answer = last.recv(4096)
                assert answer.startswith(b"HTTP/1.1 %b " % status)
                assert b"Connection: close" in answer
        assert any(closes(one) for one in late)
    for _ in range(50):
        try:
            with urllib.request.urlopen(f"{service.url}/health", timeout=5) as response:
                assert response.status == 200
            break
        except OSError:
            time.sleep(0.1)
    else:
        raise AssertionError("the service does not recover")
    complaints = [line["message"] for line in service.log() if "No connection can be accepted" in line["message"]]
    assert 1 <= len(complaints) <= 3
    assert service.stop() == 0

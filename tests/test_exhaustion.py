"""When the process runs out of file descriptors (row client-11)."""

import socket
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.support.service import start

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


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
        for _ in range(50):
            stack.enter_context(socket.create_connection(address, timeout=10)).sendall(HEALTH)
        time.sleep(1.5)
        assert process.num_fds() >= limit - 1
        early.sendall(HEALTH)
        assert early.recv(4096).startswith(b"HTTP/1.1 200")
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

"""The gateway behind nginx and Caddy, the real ones, with the configurations of the page "A reverse proxy" (contract A3, B1, B8;
failures client, proxy).

Only ports, paths of certificates and of the programs' own files are replaced. The proxies run as an ordinary user.
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import trustme
from aiohttp import web

from gptutor.config.schema import ServerSettings
from gptutor.web import page

HOST = "api.example.com"
NOBODY = 65534
START_S = 15
MEGABYTE = 1 << 20
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
"""Folders of nginx's temporary files."""


def configuration(language: str, fence: str) -> str:
    text = (page.HERE / "pages" / f"proxy.{language}.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{fence}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.mark.parametrize("fence", ["nginx", "caddy"])
def test_both_languages_have_the_same_configuration(fence: str) -> None:
    english, russian = [re.sub(r"\s*#.*", "", configuration(language, fence)) for language in ("en", "ru")]
    assert english == russian


def test_the_proxies_close_idle_connections_before_the_gateway_does() -> None:
    nginx = re.search(r"keepalive_timeout ([0-9]+)s;", configuration("en", "nginx"))
    caddy = re.search(r"keepalive ([0-9]+)s", configuration("en", "caddy"))
    assert nginx is not None
    assert caddy is not None
    assert max(int(nginx[1]), int(caddy[1])) < ServerSettings().keepalive_s


@dataclass
class Proxy:
    """A running proxy; `url` is that of its TLS listener, `folder` what it may write to."""

    program: str
    port: int
    http_port: int
    folder: Path
    tls: ssl.SSLContext
    session: aiohttp.ClientSession
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Host": HOST, **options.pop("headers", {})}
        return self.session.request(
            method, self.url + path, headers=headers, ssl=self.tls, server_hostname=HOST, allow_redirects=False, **options
        )

    def log(self) -> str:
        return (self.folder / "log").read_text()


def nginx_command(folder: Path, ports: dict[str, int], upstream: str) -> list[str]:
    text = configuration("en", "nginx")
    text = replaced(text, "server 127.0.0.1:3001;", f"server {upstream};", 1)
    text = replaced(text, "listen 80;", f"listen {ports['http']};", 1)
    text = replaced(text, "listen [::]:80;", f"listen [::]:{ports['http']};", 1)
    text = replaced(text, "listen 443 ssl http2", f"listen {ports['https']} ssl http2", 1)
    text = replaced(text, "listen [::]:443 ssl http2", f"listen [::]:{ports['https']} ssl http2", 1)
    text = replaced(text, f"/etc/letsencrypt/live/{HOST}/", f"{folder}/", 2)
    (folder / "site.conf").write_text(text)
    temporary = "".join(f"{name}_temp_path {folder}/{name};" for name in TEMPORARY)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log info; events {{}}\n"
        f"http {{ access_log off; {temporary} include {folder}/site.conf; }}"
    )
    return ["nginx", "-e", f"{folder}/log", "-p", str(folder), "-c", f"{folder}/nginx.conf"]


def caddy_command(folder: Path, ports: dict[str, int], upstream: str) -> list[str]:
    text = replaced(configuration("en", "caddy"), "127.0.0.1:3001", upstream, 1)
    text = replaced(text, f"{HOST} {{", f"{HOST} {{\ntls {folder}/fullchain.pem {folder}/privkey.pem", 1)
    ours = f"http_port {ports['http']}\nhttps_port {ports['https']}\nadmin off\nlog {{\noutput file {folder}/log\n}}"
    (folder / "Caddyfile").write_text(f"{{\n{ours}\n}}\n{text}")
    return ["caddy", "run", "--adapter", "caddyfile", "--config", f"{folder}/Caddyfile"]


def replaced(text: str, old: str, new: str, count: int) -> str:
    assert text.count(old) == count, old
    return text.replace(old, new)


COMMANDS: dict[str, Callable[[Path, dict[str, int], str], list[str]]] = {"nginx": nginx_command, "caddy": caddy_command}


@pytest.fixture(params=COMMANDS)
def program(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    if not shutil.which(found, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        pytest.skip(f"{found} is not installed (Debian: apt install {found}): its configuration is not tested")
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that an ordinary user may write to: pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="gptutor-proxy-") as name:
        if os.geteuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)


@asynccontextmanager
async def proxy_to(upstream: str, program: str, folder: Path) -> AsyncIterator[Proxy]:
    authority = trustme.CA()
    certificate = authority.issue_cert(HOST)
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    (folder / "fullchain.pem").write_bytes(b"".join(each.bytes() for each in certificate.cert_chain_pems))
    (folder / "privkey.pem").write_bytes(certificate.private_key_pem.bytes())
    ports = {name: free_port() for name in ("http", "https")}
    command = COMMANDS[program](folder, ports, upstream)
    user: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin", "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output, **user)  # noqa: ASYNC220
    try:
        async with aiohttp.ClientSession() as session:
            await listening(ports["https"], process, folder)
            yield Proxy(program, ports["https"], ports["http"], folder, tls, session, process)
    finally:
        process.terminate()
        process.wait()


async def listening(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    async with asyncio.timeout(START_S):
        while True:
            assert process.poll() is None, (folder / "output").read_text()
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.02)


def free_port() -> int:
    with socket.socket(socket.AF_INET6) as free:
        free.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        free.bind(("::", 0))
        return int(free.getsockname()[1])


def address_of(url: str) -> str:
    return f"127.0.0.1:{urlsplit(url).port}"


async def test_requests_pass_through_the_proxy(
    program: str, folder: Path, scripted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream arrives at once, no body is written to disk, bodies that are too large, HTTP/2, IPv6, the redirect, the client's
    address, the request id."""
    caplog.set_level(logging.INFO, "gptutor")
    plays, gateway = scripted
    client = await gateway.client()
    first_arrived = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"id":"gen-1","choices":[{"delta":{"content":"first"}}]}\n\n')
        await first_arrived.wait()  # a proxy that collects the response never lets the test come to that
        await response.write(LAST_EVENTS)
        return response

    plays.append(stream)
    async with proxy_to(address_of(gateway.url), program, folder) as proxy:
        close_temporary_folders(folder)  # whatever nginx wants to store there, it cannot
        body = json.dumps({"messages": [{"role": "user", "content": "x" * (MEGABYTE // 2)}], "stream": True}).encode()
        headers = {**client.headers, "Content-Type": "application/json"}
        async with (
            asyncio.timeout(20),
            proxy.request("POST", "/v1/chat/completions", data=io.BytesIO(body), headers=headers) as response,
        ):
            assert response.status == 200
            received = await response.content.readany()
            assert b"first" in received
            first_arrived.set()
            received += await response.read()
            assert received.endswith(LAST_EVENTS)
        (folder / "body.json").write_bytes(body)
        assert await over_http2(proxy, headers) == ("200", "2")
        await gateway.idle()

        plays.append(large_answer)
        body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
        async with proxy.request("POST", "/v1/chat/completions", data=body, headers=headers) as response:
            await gateway.idle()
            await asyncio.sleep(
                0.3
            )  # the client takes nothing: time for nginx to take what it wants, if it did not wait for that
            assert len(await response.read()) > ANSWER_BYTES

        await assert_large_bodies_are_refused(proxy, headers)

        caplog.clear()
        for given in ("my-id.1", "not an id", "x" * 129):
            headers = {"X-Request-ID": given, "X-Forwarded-For": "203.0.113.9"}
            async with proxy.request("GET", "/v1/credits", headers=headers) as response:
                assert (response.status, response.headers["X-Error-Code"]) == (401, "invalid_key")
                assert (response.headers["X-Request-ID"] == given) is (given == "my-id.1")
        # The proxy saw 127.0.0.1, which is a trusted proxy's address, and so nobody's.
        assert [record.address for record in caplog.records if hasattr(record, "address")] == [None] * 3

        async with proxy.session.get(
            f"http://[::1]:{proxy.http_port}/v1/models?x=1", headers={"Host": HOST}, allow_redirects=False
        ) as response:
            location = response.headers["Location"].replace(f":{proxy.port}/", "/")
            assert (response.status, location) == (308, f"https://{HOST}/v1/models?x=1")
    assert "ermission denied" not in proxy.log()


ANSWER_BYTES = 24 * MEGABYTE


async def large_answer(request: web.Request) -> web.Response:
    choices = [{"message": {"role": "assistant", "content": "x" * ANSWER_BYTES}, "finish_reason": "stop"}]
    return web.json_response({"id": "gen-2", "choices": choices, "usage": {"cost": 0.001}})


def close_temporary_folders(folder: Path) -> None:
    for name in TEMPORARY:
        if (folder / name).exists():  # Caddy has none
            (folder / name).chmod(0)


LAST_EVENTS = b'data: {"id":"gen-1","choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"cost":0.001}}\n\ndata: [DONE]\n\n'


async def over_http2(proxy: Proxy, headers: dict[str, str]) -> tuple[str, str]:
    """Status and HTTP version of the same request by curl, over IPv6."""
    curl = await asyncio.create_subprocess_exec(
        *("curl", "-sk", "--http2", "--max-time", "20", "--resolve", f"{HOST}:{proxy.port}:[::1]"),
        *("-H", f"Authorization: {headers['Authorization']}", "-H", "Content-Type: application/json"),
        *("-d", f"@{proxy.folder}/body.json", "-o", f"{proxy.folder}/answer", "-w", "%{http_code} %{http_version}"),
        f"https://{HOST}:{proxy.port}/v1/chat/completions",
        stdout=subprocess.PIPE,
    )
    output, _ = await curl.communicate()
    status, version = output.decode().split()
    return status, version


async def assert_large_bodies_are_refused(proxy: Proxy, headers: dict[str, str]) -> None:
    """By the gateway, with the number, and above nginx's own limit by nginx."""
    too_large = "Request body is larger than 10485760 bytes"
    nginx_too_large = "Request body is too large" if proxy.program == "nginx" else too_large
    for size, text in ((10 * MEGABYTE + 1, too_large), (13 * MEGABYTE, nginx_too_large)):
        async with proxy.request("POST", "/v1/chat/completions", data=io.BytesIO(b"x" * size), headers=headers) as response:
            assert (response.status, response.headers["X-Error-Code"]) == (413, "body_too_large")
            assert response.content_type == "application/json"
            assert await response.json() == {"error": text}
            assert response.headers["X-Request-ID"]


@asynccontextmanager
async def breaking_service() -> AsyncIterator[tuple[asyncio.Server, list[tuple[str, str]]]]:
    """Answers the first request of a connection, and breaks it at the second, as when the service is killed.

    Yields its server, and path and request id of each request.
    """
    received: list[tuple[str, str]] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        for answer in (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""):
            with contextlib.suppress(asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                found = re.search(r"(?i)\r\nx-request-id: (\S+)\r\n", head.decode())
                received.append((head.split()[1].decode(), found[1] if found else ""))
                if length := re.search(rb"(?i)content-length: ([0-9]+)", head):
                    await reader.readexactly(int(length[1]))
                writer.write(answer)
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server, received
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def test_a_gateway_that_does_not_answer_is_an_error_in_our_form_and_no_request_is_sent_twice(
    program: str, folder: Path
) -> None:
    async with (
        breaking_service() as (server, received),
        proxy_to(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", program, folder) as proxy,
    ):
        for method, path in (("POST", "/post"), ("GET", "/get")) if program == "nginx" else (("POST", "/post"),):
            headers = {"Idempotency-Key": "one"}
            async with proxy.request("GET", "/first") as response:
                assert response.status == 200
            async with proxy.request(method, path, data=b"{}" if method == "POST" else None, headers=headers) as response:
                assert await response.json() == {"error": "The service does not answer"}
                shown = [response.headers.get(name) for name in ("X-Error-Code", "X-Request-ID", "x-should-retry", "Retry-After")]
            ((_, request_id),) = [each for each in received if each[0] == path]  # once
            assert len(request_id) >= 32
            assert (response.status, shown) == (502, ["not_ready", request_id, "false", None])
        server.close()
        async with proxy.request("POST", "/gone", data=b"{}", headers={"X-Request-ID": "my-id"}) as response:
            assert await response.json() == {"error": "The service does not answer"}
            assert (response.status, response.headers["X-Error-Code"], response.headers["Retry-After"]) == (502, "not_ready", "1")
            assert "x-should-retry" not in response.headers
            assert response.headers["X-Request-ID"] == "my-id"

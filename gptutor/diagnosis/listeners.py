"""What answers on the ports of the settings and at the public address, and the limits of the process that does."""

import asyncio
import errno
import re
import resource
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import aiohttp
import orjson
import psutil

from gptutor.config.schema import Config
from gptutor.diagnosis.findings import Finding, Installation, error, ok, warning
from gptutor.server.listener import host_and_port

HTTP_S = 5.0
BODY_BYTES_MAX = 64 * 1024
TEXT_CHARACTERS_MAX = 200
DESCRIPTORS_SPARE = 100
CERTIFICATE_DAYS_LEAST = 7
CERTIFICATE_DAYS_LOW = 21
"""certbot and Caddy renew 30 days before the end: with less, the renewal has failed already."""
REDIRECTS = (301, 302, 307, 308)
OPEN_FILES = re.compile(r"^Max open files +(\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    text: str
    location: str
    is_ours: bool
    """Every response of GPTutor has an X-Request-ID."""


async def _get(url: str) -> Answer:
    """Raises aiohttp.ClientError, OSError, TimeoutError."""
    timeout = aiohttp.ClientTimeout(total=HTTP_S)
    tls = ssl.create_default_context() if url.startswith("https:") else True
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
        session.get(url, allow_redirects=False, ssl=tls) as response,
    ):
        body = await response.content.read(BODY_BYTES_MAX)
        headers = response.headers
        return Answer(response.status, body.decode("utf-8", "replace"), headers.get("Location", ""), "X-Request-ID" in headers)


def local_url(config: Config) -> str:
    """Where this machine reaches the service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.server.host, config.server.host)  # noqa: S104 - it is compared
    return f"http://{host_and_port(host, config.server.port)}"


async def service(installation: Installation) -> Sequence[Finding]:
    """Whether the service runs, and is ready."""
    config = installation.config
    if not config.server.port:
        return [ok("server.port is 0: the service takes any free port, and is not looked for.")]
    url = local_url(config)
    try:
        health, ready = await _get(f"{url}/health"), await _get(f"{url}/ready")
    except (aiohttp.ClientConnectorError, ConnectionError):
        return [warning(f"The service does not run: nothing listens at {url}. Start it, such as by systemctl start gptutor.")]
    except (aiohttp.ClientError, OSError, TimeoutError):
        return [error(f"Something listens at {url} and does not answer: restart the service, and see its log.")]
    if not health.is_ours:
        return [error(f"Another program answers at {url}: stop it, or set another PORT.")]
    if ready.status != 200:
        return [error(f"The service runs and is not ready ({_reason(ready)}): see its log, and the other findings here.")]
    return [ok(f"The service runs at {url}, and is ready.")]


def _reason(answer: Answer) -> str:
    try:
        return str(orjson.loads(answer.text)["error"])[:TEXT_CHARACTERS_MAX]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return str(answer.status)


async def ports(installation: Installation) -> Sequence[Finding]:
    """Of each listener: the port is free, or the service itself has it."""
    config = installation.config
    is_running = bool(_pids_listening(config.server.port)) if config.server.port else False
    findings: list[Finding] = []
    wanted = [("PORT", config.server.host, config.server.port)]
    wanted += [("GPTUTOR_METRICS__PORT", config.metrics.host, config.metrics.port)]
    wanted += [("GPTUTOR_ADMIN__PORT", "127.0.0.1", config.admin.port)]
    if config.simulated:
        wanted += [("GPTUTOR_SIMULATOR__PORT", config.simulator.host, config.simulator.port)]
    for setting, host, port in wanted:
        if port and (sentence := _cannot_listen(host, port)) is not None:
            if sentence == "":
                findings += await _taken(setting, host, port, is_public=setting == "PORT", is_running=is_running)
            else:
                findings.append(error(f"{host_and_port(host, port)} ({setting}) cannot be used: {sentence}"))
    if config.admin.socket and not Path(config.admin.socket).parent.is_dir():
        findings.append(error(f"The folder of admin.socket, {Path(config.admin.socket).parent}, does not exist: make it."))
    return findings or [ok("All ports of the settings are free.")]


def _cannot_listen(host: str, port: int) -> str | None:
    """Why not; empty if the port is taken, None if it is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as failure:
        if failure.errno == errno.EADDRINUSE:
            return ""
        advice = {errno.EACCES: "ports below 1024 need root: set another, and put a reverse proxy in front"}
        return f"{failure.strerror}; {advice.get(failure.errno or 0, 'set an address of this machine')}."
    return None


async def _taken(setting: str, host: str, port: int, *, is_public: bool, is_running: bool) -> list[Finding]:
    place = f"{host_and_port(host, port)} ({setting})"
    if is_public:
        return []  # `service` asks who answers there
    names = sorted({_program(pid) for pid in _pids_listening(port)})
    if is_running and any(name.startswith(("gptutor", "python")) for name in names):
        return [ok(f"{place} is taken by the service itself.")]
    if names:
        return [error(f"{place} is taken by {', '.join(names)}: stop it, or change the setting.")]
    return [warning(f"{place} is taken, by the service or another program: as root this command says by which.")]


def _pids_listening(port: int) -> list[int]:
    """The processes that listen on a TCP port; only one's own, unless root looks."""
    try:
        found = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return []
    listening = (each for each in found if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port)
    return [each.pid for each in listening if each.pid is not None]


def _program(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return str(pid)


async def limits(installation: Installation) -> Sequence[Finding]:
    """File descriptors: of the running service if it can be seen, else of this shell, which is not the service's."""
    config = installation.config
    needed = (
        config.server.connections_max + config.openrouter.connections_max + config.database.connections_max + DESCRIPTORS_SPARE
    )
    pids = _pids_listening(config.server.port) if config.server.port else []
    for pid in pids:
        allowed = _open_files(pid)
        if allowed is not None and allowed < needed:
            return [
                error(
                    f"The service may open {allowed} files, and its connections need {needed}: set LimitNOFILE=65536 in its unit."
                )
            ]
        if allowed is not None:
            return [ok(f"The service may open {allowed} files; its connections need {needed}.")]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        ok(f"The service is not visible to this command: it needs {needed} open files (LimitNOFILE); this shell allows {soft}.")
    ]


def _open_files(pid: int) -> int | None:
    try:
        found = OPEN_FILES.search(Path(f"/proc/{pid}/limits").read_text(encoding="ascii"))
    except OSError:
        return None
    return int(found[1]) if found is not None and found[1].isdecimal() else None


# -- the public address


async def public_address(installation: Installation) -> Sequence[Finding]:
    """The certificate, the redirect from HTTP, and the service behind them."""
    if not installation.address:
        return [ok("TLS is not looked at: give the public address by --url https://….")]
    parts = urlsplit(installation.address)
    host, port = parts.hostname or "", parts.port or 443
    url = f"https://{host_and_port(host, port)}"
    findings = await _certificate(host, port)
    findings += await _through(url, parts.path.rstrip("/"))
    if port == 443:
        findings += await _redirect(f"http://{host_and_port(host, 80)}/")
    return findings


async def _certificate(host: str, port: int) -> list[Finding]:
    try:
        async with asyncio.timeout(HTTP_S):
            _, writer = await asyncio.open_connection(host, port, ssl=ssl.create_default_context(), server_hostname=host)
    except ssl.SSLCertVerificationError as failure:
        return [error(f"The certificate of {host} is not accepted ({failure.verify_message}): renew it, with its whole chain.")]
    except ssl.SSLError:
        return [error(f"{host} does not speak TLS on port {port}: set up the reverse proxy.")]
    except (OSError, TimeoutError) as failure:
        return [
            error(f"{host} cannot be reached on port {port} ({type(failure).__name__}): check DNS, the firewall and the proxy.")
        ]
    certificate = cast("ssl.SSLObject", writer.get_extra_info("ssl_object")).getpeercert() or {}
    writer.transport.abort()
    days = int((ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) // 86_400)
    told = f"The certificate of {host} is valid for {days} more days"
    if days < CERTIFICATE_DAYS_LEAST:
        return [error(f"{told}: renew it now (certbot renew), and find out why it is not renewed by itself.")]
    if days < CERTIFICATE_DAYS_LOW:
        return [warning(f"{told}, and is not renewed by itself: see certbot renew --dry-run.")]
    return [ok(f"{told}.")]


async def _through(url: str, prefix: str) -> list[Finding]:
    """`/health`, and an error of ours, which a proxy must not replace by a page of its own."""
    try:
        health, missing = await _get(f"{url}{prefix}/health"), await _get(f"{url}{prefix}/v1/no-such-path")
    except (aiohttp.ClientError, OSError, TimeoutError) as failure:
        return [error(f"{url}{prefix}/health does not answer ({type(failure).__name__}): see the log of the reverse proxy.")]
    if health.status != 200 or not health.is_ours:
        return [error(f"{url}{prefix}/health is answered with {health.status}, not by the service: check the proxy's upstream.")]
    if not missing.is_ours:
        return [error(f"The reverse proxy at {url} replaces error responses: turn that off (proxy_intercept_errors off).")]
    return [ok(f"The service answers at {url}{prefix}.")]


async def _redirect(url: str) -> list[Finding]:
    try:
        answer = await _get(url)
    except (aiohttp.ClientError, OSError, TimeoutError):
        return [ok(f"{url} does not answer: nobody can send a key without TLS.")]
    if answer.status in REDIRECTS and answer.location.startswith("https://"):
        return [ok(f"{url} redirects to HTTPS.")]
    return [error(f"{url} answers without TLS, and keys could be sent in the clear: redirect it to HTTPS.")]

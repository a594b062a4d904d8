"""OpenRouter over TLS and through an outbound proxy: a real one, tinyproxy from Debian (contract C8, F8; row upstream-1)."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trustme
from aiohttp import web

from gptutor.config import load
from gptutor.config.schema import ConfigError
from gptutor.database import pool
from gptutor.simulator.server import Simulator
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import Gateway, config_for, gateway_on


@pytest.fixture(scope="module")
def tinyproxy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tinyproxy program: the installed one, or unpacked from Debian's package."""
    if installed := shutil.which("tinyproxy"):
        return installed
    if not shutil.which("apt-get"):
        pytest.skip("tinyproxy is not installed, and this is no Debian: the outbound proxy is not checked")
    directory = tmp_path_factory.mktemp("tinyproxy")
    own = ["-o", f"Dir::State={directory}/state", "-o", f"Dir::Cache={directory}/cache", "-o", "APT::Sandbox::User="]
    for place in ("state/lists/partial", "cache/archives/partial"):
        (directory / place).mkdir(parents=True)
    for command in (["update"], ["download", "tinyproxy-bin"]):
        ran = subprocess.run(["apt-get", *own, *command], cwd=directory, check=False, capture_output=True, text=True)
        if ran.returncode:
            pytest.skip(f"tinyproxy cannot be downloaded, the outbound proxy is not checked: {ran.stderr[-200:]}")
    (package,) = directory.glob("tinyproxy-bin_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
    return str(directory / "usr/bin/tinyproxy")


@pytest.fixture
def proxy(tinyproxy: str, tmp_path: Path, unused_tcp_port: int) -> Iterator[tuple[str, Path]]:
    """A running proxy with a password: its address without the password, and its log."""
    port, log = unused_tcp_port, tmp_path / "proxy.log"
    settings = tmp_path / "proxy.conf"
    settings.write_text(
        f'Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nBasicAuth ivan s3cret\nLogFile "{log}"\nLogLevel Connect\nTimeout 60\n'
    )
    process = subprocess.Popen([tinyproxy, "-d", "-c", settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.02)
    yield f"127.0.0.1:{port}", log
    process.terminate()
    process.wait(timeout=10)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def secure(authority: trustme.CA) -> AsyncIterator[tuple[Simulator, str]]:
    """The simulator over TLS, and the base URL of its API."""
    simulator, context = Simulator(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    runner = web.AppRunner(simulator.app(), shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "localhost", 0, ssl_context=context).start()
    yield simulator, f"https://localhost:{runner.addresses[0][1]}/api/v1"
    await runner.cleanup()


@asynccontextmanager
async def gateway_through(
    proxy: str, secure: tuple[Simulator, str], database: pool.Database, database_url: str, directory: Path
) -> AsyncIterator[Gateway]:
    simulator, base_url = secure
    settings = config_for(database_url, base_url, directory)
    settings = msgspec.structs.replace(settings, openrouter=msgspec.structs.replace(settings.openrouter, proxy=proxy))
    async with gateway_on(settings, database, simulator) as gateway:
        yield gateway


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("stream", [False, True])
async def test_openrouter_is_reached_through_the_proxy_and_does_not_see_it(
    proxy: tuple[str, Path],
    secure: tuple[Simulator, str],
    database: pool.Database,
    database_url: str,
    tmp_path: Path,
    stream: bool,
) -> None:
    address, log = proxy
    async with gateway_through(f"http://ivan:s3cret@{address}", secure, database, database_url, tmp_path) as gateway:
        client = await gateway.client()
        response, _ = await gateway.chat(client, stream=stream)
        assert response.status == 200
        await assert_charges_match_bills(gateway, client)
        (record,) = gateway.simulator.billing.records.values()
    assert not [name for name in record.headers if name.lower().startswith(("proxy-", "via", "x-forwarded"))]
    assert "CONNECT localhost" in log.read_text()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("known", ["ivan:wrong@", ""])
async def test_a_proxy_that_rejects_us_means_openrouter_unreachable_and_costs_nothing(
    proxy: tuple[str, Path],
    secure: tuple[Simulator, str],
    database: pool.Database,
    database_url: str,
    tmp_path: Path,
    known: str,
) -> None:
    async with gateway_through(f"http://{known}{proxy[0]}", secure, database, database_url, tmp_path) as gateway:
        await assert_unreachable(gateway)


@pytest.mark.usefixtures("trusted")
async def test_an_unreachable_proxy_means_the_same(
    secure: tuple[Simulator, str], database: pool.Database, database_url: str, tmp_path: Path, unused_tcp_port: int
) -> None:
    async with gateway_through(f"http://127.0.0.1:{unused_tcp_port}", secure, database, database_url, tmp_path) as gateway:
        await assert_unreachable(gateway)


async def test_an_untrusted_certificate_is_not_accepted(
    secure: tuple[Simulator, str], database: pool.Database, database_url: str, tmp_path: Path
) -> None:
    async with gateway_through("", secure, database, database_url, tmp_path) as gateway:
        await assert_unreachable(gateway)


async def assert_unreachable(gateway: Gateway) -> None:
    client = await gateway.client()
    async with asyncio.timeout(20):
        response, _ = await gateway.chat(client)
    assert (response.status, response.headers["X-Error-Code"]) == (500, "upstream_unreachable")
    assert not gateway.simulator.billing.records
    assert await client.held() == 0
    assert await client.balance() == 100


REAL = {"OPENROUTER_API_KEY": "sk-or-1"}


@pytest.mark.parametrize(
    ("environ", "proxy"),
    [
        ({}, ""),
        ({"HTTPS_PROXY": "http://p:3128"}, "http://p:3128"),
        ({"https_proxy": "p:3128"}, "http://p:3128"),
        ({"HTTPS_PROXY": "http://p:3128", "GPTUTOR_OPENROUTER__PROXY": "http://own:1"}, "http://own:1"),
        ({"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "localhost, .openrouter.ai"}, ""),
        ({"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "router.ai"}, "http://p:3128"),
        ({"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "*"}, ""),
        ({"HTTPS_PROXY": "http://p:3128", "OPENROUTER_BASE_URL": "http://localhost:3002/api/v1"}, ""),
    ],
)
def test_the_proxy_from_the_environment(environ: dict[str, str], proxy: str) -> None:
    assert load.load({**REAL, **environ}).openrouter.proxy == proxy


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "GPTUTOR_OPENROUTER__PROXY"])
def test_the_error_for_an_invalid_proxy_url_does_not_show_its_password(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load.load({**REAL, name: "socks5://ivan:s3cret@p:1080"})
    assert name in str(caught.value)
    assert "s3cret" not in str(caught.value)

"""The documentation matches the code, in both languages, and loads nothing from other hosts (contract F4)."""

import asyncio
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints
from urllib.parse import unquote, urljoin, urlsplit

import msgspec
import pytest
import yaml

from gptutor.api.chat.request import ChatRequest, Message, Tool, parse_request
from gptutor.app import build_app
from gptutor.config.load import DEFAULT_FILE
from gptutor.config.schema import Config, DocsSettings
from gptutor.errors import ERRORS, ApiError
from gptutor.server.listener import StartError
from gptutor.telemetry.logs import LoggerService
from gptutor.web import openapi, page
from gptutor.web.site import build_site, documentation, preferred_language
from tests.support.gateway import Gateway
from tests.support.late import LateImport

if TYPE_CHECKING:
    import openapi_spec_validator
else:
    openapi_spec_validator = LateImport("openapi_spec_validator")

PAGES = [(language, name) for language in page.LANGUAGES for name in page.NAMES]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VENDOR = page.HERE / "vendor" / "scalar"


class Links(HTMLParser):
    """The URLs that a document loads, its links, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(named["href"])
        else:
            self.loaded += [named[name] for name in ("src", "href", "srcset", "data-url") if name in named]
        if "id" in named:
            self.anchors.add(named["id"])


def source(language: str, name: str) -> str:
    return (page.HERE / "pages" / f"{name}.{language}.md").read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# -- the reference


def test_openapi_describes_exactly_the_routes_of_the_gateway() -> None:
    app = build_app(Config(), log=LoggerService(), secrets=[b"x" * 32])
    routes = {(route.resource.canonical, route.method) for route in app.router.routes() if route.resource is not None}
    described = {(path, method.upper()) for path, item in openapi.describe()["paths"].items() for method in item}
    assert described == {(path, method) for path, method in routes if method != "HEAD"}


def test_the_description_is_valid_openapi() -> None:
    openapi_spec_validator.validate(openapi.describe())


def test_openapi_lists_every_error_code() -> None:
    components = openapi.describe()["components"]
    assert components["schemas"]["ErrorCode"]["enum"] == list(ERRORS)
    for code, kind in ERRORS.items():
        response = components["responses"][f"Error{kind.status}"]
        assert code in response["headers"]["X-Error-Code"]["schema"]["enum"]
        assert set(kind.headers) <= set(response["headers"])
        assert response["content"]["application/json"]["examples"][code]["value"] == {"error": kind.text}


def test_every_error_response_in_openapi_has_a_code_and_a_request_id() -> None:
    for path in openapi.describe()["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                assert response.get("$ref") == f"#/components/responses/Error{status}" or "X-Request-ID" in response["headers"]


def test_request_schemas_are_defined_only_in_the_code() -> None:
    written = yaml.load(openapi.SOURCE.read_text(encoding="utf-8"), Loader=openapi.LOADER)["components"]["schemas"]
    described = openapi.describe()["components"]["schemas"]
    for struct in (ChatRequest, Message, Tool):
        descriptions = written[struct.__name__]
        assert set(descriptions) == {"description", "properties"}
        assert set(descriptions["properties"]) == set(get_type_hints(struct)) == set(described[struct.__name__]["properties"])
        assert all(set(field) == {"description"} for field in descriptions["properties"].values())
        assert described[struct.__name__]["additionalProperties"] is True
    assert described["ChatRequest"]["properties"]["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}


def test_example_requests_in_openapi_are_accepted() -> None:
    operation = openapi.describe()["paths"]["/v1/chat/completions"]["post"]
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        assert parse_request(json.dumps(example["value"]).encode(), default_model="some/model")


def test_the_vendored_viewer_has_the_checksum_in_its_readme() -> None:
    digest = hashlib.sha256((VENDOR / "standalone.js").read_bytes()).hexdigest()
    assert digest in (VENDOR / "README.md").read_text(encoding="utf-8")
    assert "MIT License" in (VENDOR / "LICENSE").read_text(encoding="utf-8")


def test_the_viewer_supports_every_option_that_is_set() -> None:
    """A new version might rename an option; what the option turned off would then silently be on again."""
    viewer = (VENDOR / "standalone.js").read_text(encoding="utf-8")
    text = (page.HERE / "reference.html").read_text(encoding="utf-8")
    found = re.search(r"data-configuration='(.*?)'", text, re.DOTALL)
    assert found
    for option in json.loads(found[1]):
        assert re.search(rf"\b{option}:\w+\(", viewer), option


# -- the guide


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_the_errors_page_lists_every_code_with_its_status(language: str) -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", source(language, "errors"), re.MULTILINE)
    assert sorted(rows) == sorted((str(kind.status), code) for code, kind in ERRORS.items())


def test_every_setting_is_in_the_settings_file() -> None:
    document = yaml.load(DEFAULT_FILE.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    settings = {
        section.name: {setting.encode_name for setting in msgspec.structs.fields(section.type)}
        for section in msgspec.structs.fields(Config)
    }
    assert {section: set(keys) for section, keys in document.items()} == settings


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_the_settings_page_contains_the_settings_file(language: str) -> None:
    body = page.load_pages()[language, "settings"].body
    assert "  balance_min_rub: 1 " in body
    assert all(f"\n{section.name}:\n" in body for section in msgspec.structs.fields(Config))


@pytest.mark.parametrize("name", page.NAMES)
def test_pages_have_the_same_outline_in_both_languages(name: str) -> None:
    """Sections, tables and examples of the same kinds, in the same order."""
    outline = re.compile(r"^(#+ |\|.*(?=\n\|[-| ]+$)|```\w*)", re.MULTILINE)
    shapes = [outline.findall(source(language, name)) for language in page.LANGUAGES]
    kinds = [["|" * line.count("|") if line.startswith("|") else line for line in shape] for shape in shapes]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(("language", "name"), PAGES)
def test_examples_are_requests_that_the_gateway_accepts(language: str, name: str) -> None:
    text = source(language, name)
    for example in fences(text, "json"):
        json.loads(example)
    for body in re.findall(r"-d '(\{.*?\})'$", text, re.MULTILINE | re.DOTALL):
        assert parse_request(body.encode(), default_model="some/model")


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_the_quoted_error_text_is_the_gateways(language: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(b'{"messages": [{"role": "user", "content": "?"}], "temperature": 3}', default_model="some/model")
    assert f"`{caught.value.text}`" in source(language, "request")


async def test_every_page_renders_and_no_link_is_broken(aiohttp_client: Any) -> None:
    site = await aiohttp_client(build_site())
    visited: dict[str, Links] = {}

    async def visit(path: str) -> Links:
        if path not in visited:
            async with site.get(path) as response:
                assert response.status == 200, path
                assert not response.history, f"{path} leads to a redirect"
                visited[path] = Links(await response.text() if response.content_type == "text/html" else "")
        return visited[path]

    pages = [f"/{language}/{name}" for language, name in PAGES]
    for path in [*pages, "/reference"]:
        document = await visit(path)
        for link in [*document.links, *document.loaded]:
            target = urlsplit(urljoin(path, link))
            if target.scheme or target.path == "/":
                continue
            linked = await visit(target.path)
            assert not target.fragment or unquote(target.fragment) in linked.anchors, f"{path} → {link}"
    assert all(path in visited for path in pages)


async def test_nothing_is_loaded_from_another_host(aiohttp_client: Any) -> None:
    site = await aiohttp_client(build_site())
    for path in [*(f"/{language}/{name}" for language, name in PAGES), "/reference", "/style.css", "/nowhere"]:
        async with site.get(path) as response:
            text, policy = await response.text(), response.headers["Content-Security-Policy"]
        assert not re.search(r"https?:|\*|unsafe-eval|script-src[^;]*unsafe", policy)
        assert policy.startswith("default-src 'none';")
        foreign = [link for link in Links(text).loaded if re.match(r"[a-z]+:|//", link) and not link.startswith("data:")]
        assert not foreign, path
        assert not re.search(r"url\(|@import", text) or path != "/style.css"


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "ru"),
        ("*", "ru"),
        ("de-DE,de;q=0.9", "ru"),
        ("en", "en"),
        ("en-US,en;q=0.9", "en"),
        ("ru-RU,ru;q=0.9,en-US;q=0.8,en;q=0.7", "ru"),
        ("fr, en;q=0.8, ru;q=0.3", "en"),
        ("EN-gb", "en"),
        ("en;q=nonsense, ,;;", "ru"),
    ],
)
async def test_the_start_page_follows_accept_language(accepted: str, language: str, aiohttp_client: Any) -> None:
    assert preferred_language(accepted) == language
    site = await aiohttp_client(build_site())
    async with site.get("/", headers={"Accept-Language": accepted}, allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (302, f"/{language}/start")
        assert response.headers["Vary"] == "Accept-Language"


async def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}"):
            async with documentation(Config(docs=DocsSettings(port=port))):
                pass


# -- the examples, run


def runnable() -> list[Any]:
    """Parameters of the test below: the program with its options, and the code of an example."""
    examples = []
    for language in page.LANGUAGES:
        start, response = source(language, "start"), source(language, "response")
        examples.append(pytest.param([sys.executable, "-c"], fences(start, "python")[0], id=f"python-{language}"))
        examples.append(
            pytest.param(["node", "--input-type=module", "-e"], fences(response, "javascript")[0], id=f"node-{language}")
        )
        for number, code in enumerate(code for code in fences(start, "bash") if "curl" in code):
            examples.append(pytest.param(["sh", "-c"], code, id=f"curl-{number}-{language}"))
    return examples


@pytest.mark.parametrize(("program", "code"), runnable())
async def test_examples_of_the_guide_run(program: list[str], code: str, gateway: Gateway) -> None:
    needed = "curl" if program[0] == "sh" else program[0]
    if shutil.which(needed) is None:
        pytest.skip(f"{needed} is not installed")
    client = await gateway.client()
    process = await asyncio.create_subprocess_exec(
        *program,
        code.replace("http://localhost:3001", gateway.url).replace("sk-user-…", client.key),
        env={"PATH": os.environ["PATH"], "API_KEY": client.key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert "OpenRouter" in out.decode()
    await gateway.idle()
    assert await client.balance() < 100


# -- the reference in a real browser


async def browse(url: str, directory: Path) -> tuple[str, list[str]]:
    """The document as the browser rendered it, and the messages of its console."""
    assert BROWSER is not None
    process = await asyncio.create_subprocess_exec(
        BROWSER,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={directory}", "--window-size=1280,2000"),
        *("--enable-logging=stderr", "--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"),
        *("--dump-dom", url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(180):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return out.decode(), [line for line in err.decode(errors="replace").splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed (Debian: apt install chromium)")
async def test_the_reference_renders_in_a_browser_without_other_hosts(tmp_path: Path) -> None:
    async with documentation(Config(docs=DocsSettings(port=0))) as url:
        text, console = await browse(f"{url}/reference", tmp_path)
    for path in openapi.describe()["paths"].values():
        for operation in path.values():
            assert operation["summary"] in text
    for offer in ("Ask AI", "Generate MCP", "Developer Tools", "Test Request", "Open API Client"):
        assert offer not in text
    # The viewer logs its own name. Anything else would be a failure, or something that the Content-Security-Policy blocked.
    assert not [line for line in console if '"@scalar/api-reference@' not in line]

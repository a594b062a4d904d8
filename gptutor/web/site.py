"""The documentation site (contract F4): the guide in two languages, and the API reference.

Pages are rendered once, when the application is built. Nothing is loaded from other hosts, which the Content-Security-Policy of
every response makes the browser enforce.
"""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from gptutor.config.schema import Config
from gptutor.server.listener import listening_on
from gptutor.server.runners import connection_factory
from gptutor.web.openapi import describe, describe_admin
from gptutor.web.page import LANGUAGES, NAMES, load_pages, render

HERE = Path(__file__).parent
OPENAPI, OPENAPI_ADMIN = "/openapi.json", "/openapi-admin.json"

# The guide uses no scripts.
GUIDE_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Scalar, the viewer of the API reference, creates style elements, style attributes and small images. This site serves its script.
REFERENCE_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ACCEPTED_LANGUAGE = re.compile(r"\s*([A-Za-z]+)(?:-[A-Za-z0-9-]+)?\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?))?\s*")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_site() -> web.Application:
    """The site as an application: `/ru/…` and `/en/…`, `/reference`, and the files that these pages load."""
    pages = load_pages()
    site = web.Application()
    site.on_response_prepare.append(add_security_headers)
    site.router.add_get("/", choose_language)
    for language in LANGUAGES:
        site.router.add_get(f"/{language}", redirect(f"/{language}/{NAMES[0]}"))
        site.router.add_get(f"/{language}/", redirect(f"/{language}/{NAMES[0]}"))
        for name in NAMES:
            site.router.add_get(f"/{language}/{name}", static(render(pages, language, name), "text/html"))
    site.router.add_get("/style.css", static((HERE / "style.css").read_text(encoding="utf-8"), "text/css"))
    reference = (HERE / "reference.html").read_text(encoding="utf-8")
    site.router.add_get("/reference", static(reference, "text/html", REFERENCE_POLICY))
    site.router.add_get("/reference-admin", static(reference.replace(OPENAPI, OPENAPI_ADMIN), "text/html", REFERENCE_POLICY))
    site.router.add_get(OPENAPI, static(json.dumps(describe(), ensure_ascii=False), "application/json"))
    site.router.add_get(OPENAPI_ADMIN, static(json.dumps(describe_admin(), ensure_ascii=False), "application/json"))
    site.router.add_static("/vendor", HERE / "vendor")
    return site


@asynccontextmanager
async def documentation(config: Config) -> AsyncIterator[str]:
    """Serves the site on `docs.host` and `docs.port`; yields its URL. Raises StartError."""
    runner = web.AppRunner(build_site(), access_log=None, shutdown_timeout=1)
    connection = connection_factory(config)
    async with listening_on(runner, config.docs.host, config.docs.port, connection, setting="GPTUTOR_DOCS__PORT") as url:
        yield url


async def choose_language(request: web.Request) -> web.StreamResponse:
    language = preferred_language(request.headers.get("Accept-Language", ""))
    return web.Response(status=302, headers={"Location": f"/{language}/{NAMES[0]}", "Vary": "Accept-Language"})


def preferred_language(accepted: str) -> str:
    """The available language that an Accept-Language header prefers; the default language if it names none of them."""
    matches = [
        match for item in accepted.split(",") if (match := ACCEPTED_LANGUAGE.fullmatch(item)) and match[1].lower() in LANGUAGES
    ]
    best = max(matches, key=lambda match: float(match[2] or 1), default=None)
    return best[1].lower() if best else next(iter(LANGUAGES))


def redirect(location: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": location})

    return handler


def static(text: str, content_type: str, policy: str = GUIDE_POLICY) -> Handler:
    """A handler that always sends the same text."""
    body = text.encode()

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(
            body=body,
            content_type=content_type,
            charset="utf-8",
            headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"},
        )

    return handler


async def add_security_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Runs for every response, including static files and errors."""
    response.headers.setdefault("Content-Security-Policy", GUIDE_POLICY)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"

"""The documentation site (contract F4): the guide in two languages, and the API reference.

Everything is made once, when the application is built; a request only looks it up. Nothing is loaded from another host, and each
answer carries a Content-Security-Policy, by which the reader's own browser sees to that.
"""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from gptutor.config.schema import Config
from gptutor.server.listener import listening_on
from gptutor.web.openapi import describe
from gptutor.web.page import LANGUAGES, NAMES, load_pages, render

HERE = Path(__file__).parent

# The guide has no script at all.
GUIDE_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Scalar writes style elements and style attributes, and draws small images of its own; its code is one file of ours.
REFERENCE_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
WISH = re.compile(r"\s*([A-Za-z]+)(?:-[A-Za-z0-9-]+)?\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?))?\s*")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_site() -> web.Application:
    """The site as an application: `/ru/…` and `/en/…`, `/reference`, and the files that these name."""
    pages = load_pages()
    site = web.Application()
    site.on_response_prepare.append(guard)
    site.router.add_get("/", choose_language)
    for language in LANGUAGES:
        site.router.add_get(f"/{language}", redirect(f"/{language}/{NAMES[0]}"))
        site.router.add_get(f"/{language}/", redirect(f"/{language}/{NAMES[0]}"))
        for name in NAMES:
            site.router.add_get(f"/{language}/{name}", made(render(pages, language, name), "text/html"))
    site.router.add_get("/style.css", made((HERE / "style.css").read_text(encoding="utf-8"), "text/css"))
    site.router.add_get("/reference", made((HERE / "reference.html").read_text(encoding="utf-8"), "text/html", REFERENCE_POLICY))
    site.router.add_get("/openapi.json", made(json.dumps(describe(), ensure_ascii=False), "application/json"))
    site.router.add_static("/vendor", HERE / "vendor")
    return site


@asynccontextmanager
async def documentation(config: Config) -> AsyncIterator[str]:
    """The site on its port; gives its address. Raises StartError."""
    runner = web.AppRunner(build_site(), access_log=None, shutdown_timeout=1)
    async with listening_on(runner, config.docs.host, config.docs.port, setting="GPTUTOR_DOCS__PORT") as url:
        yield url


async def choose_language(request: web.Request) -> web.StreamResponse:
    language = preferred_language(request.headers.get("Accept-Language", ""))
    return web.Response(status=302, headers={"Location": f"/{language}/{NAMES[0]}", "Vary": "Accept-Language"})


def preferred_language(accepted: str) -> str:
    """The best of our languages by an Accept-Language header; the first of them where it names none."""
    wishes = [wish for item in accepted.split(",") if (wish := WISH.fullmatch(item)) and wish[1].lower() in LANGUAGES]
    best = max(wishes, key=lambda wish: float(wish[2] or 1), default=None)
    return best[1].lower() if best else next(iter(LANGUAGES))


def redirect(location: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": location})

    return handler


def made(text: str, content_type: str, policy: str = GUIDE_POLICY) -> Handler:
    """A handler for something that was made at the start."""
    body = text.encode()

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(
            body=body,
            content_type=content_type,
            charset="utf-8",
            headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"},
        )

    return handler


async def guard(request: web.Request, response: web.StreamResponse) -> None:
    """For every answer, files and errors included."""
    response.headers.setdefault("Content-Security-Policy", GUIDE_POLICY)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"

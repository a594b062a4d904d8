"""Rendering the pages of the guide: Markdown in `pages/<name>.<language>.md`, inside the template `page.html`."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from markdown_it.token import Token

from gptutor.config.load import DEFAULT_FILE

HERE = Path(__file__).parent
CLIENT_PAGES = ("start", "account", "request", "response", "money", "usage", "errors", "limits")
OPERATOR_PAGES = (
    *("install", "settings", "proxy", "processes", "machines", "monitoring", "alerts", "backup", "upgrade"),
    *("commands", "admin-api", "payments", "troubleshooting"),
)
NAMES = (*CLIENT_PAGES, *OPERATOR_PAGES)
"""The pages in reading order; the first is the start page."""

LANGUAGES: Mapping[str, Mapping[str, str]] = {
    "ru": {
        "name": "Русский",
        "about": "Документация",
        "guide": "Руководство",
        "operation": "Эксплуатация",
        "reference": "Справочник API",
        "previous": "Назад",
        "next": "Дальше",
        "skip": "К тексту",
    },
    "en": {
        "name": "English",
        "about": "Documentation",
        "guide": "Guide",
        "operation": "Operating it",
        "reference": "API reference",
        "previous": "Back",
        "next": "Next",
        "skip": "To the text",
    },
}
"""The texts of the template. The first language is the default."""

Pages = Mapping[tuple[str, str], "Page"]


@dataclass(frozen=True, slots=True)
class Heading:
    anchor: str
    text: str


@dataclass(frozen=True, slots=True)
class Page:
    """`body` is HTML; `headings` are those of the second level."""

    title: str
    headings: tuple[Heading, ...]
    body: str


def load_pages() -> Pages:
    """Every page, by language and name."""
    return {
        (language, name): read_page((HERE / "pages" / f"{name}.{language}.md").read_text(encoding="utf-8"))
        for language in LANGUAGES
        for name in NAMES
    }


def read_page(source: str) -> Page:
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(source)
    title, headings = "", []
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            text = plain_text(tokens[index + 1])
            token.attrSet("id", anchor_of(text))
            if token.tag == "h1":
                title = text
            elif token.tag == "h2":
                headings.append(Heading(anchor_of(text), text))
        elif token.type == "fence" and token.info == DEFAULT_FILE.name:
            token.content = DEFAULT_FILE.read_text(
                encoding="utf-8"
            )  # the settings file itself, so that settings are described only once
    return Page(title, tuple(headings), markdown.renderer.render(tokens, markdown.options, {}))


def plain_text(inline: Token) -> str:
    """The text of a heading without its markup."""
    return "".join(child.content for child in inline.children or ())


def anchor_of(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def render(pages: Pages, language: str, name: str) -> str:
    """One page as a whole HTML document."""
    page, texts = pages[language, name], LANGUAGES[language]
    position = NAMES.index(name)
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        {key: html.escape(text) for key, text in texts.items()},
        language=language,
        title=html.escape(page.title),
        languages=" ".join(language_link(other, name, current=other == language) for other in LANGUAGES),
        navigation="\n".join(navigation(pages, language, name)),
        body=page.body,
        pager="\n".join(
            f'<a class="{side}" href="{NAMES[neighbour]}"><small>{html.escape(texts[side])}</small> '
            f"{html.escape(pages[language, NAMES[neighbour]].title)}</a>"
            for side, neighbour in (("previous", position - 1), ("next", position + 1))
            if 0 <= neighbour < len(NAMES)
        ),
    )


def language_link(language: str, name: str, *, current: bool) -> str:
    attribute = ' aria-current="true"' if current else ""
    return f'<a href="/{language}/{name}" hreflang="{language}" lang="{language}"{attribute}>{LANGUAGES[language]["name"]}</a>'


def navigation(pages: Pages, language: str, current: str) -> list[str]:
    """List items of every page, with the sections of the current page below it. The pages for operators have a heading."""
    items = []
    for name in NAMES:
        page = pages[language, name]
        if name == OPERATOR_PAGES[0]:
            items.append(f'<li class="apart">{html.escape(LANGUAGES[language]["operation"])}</li>')
        attribute = ' aria-current="page"' if name == current else ""
        items.append(f'<li><a href="{name}"{attribute}>{html.escape(page.title)}</a>')
        if name == current and page.headings:
            sections = (f'<li><a href="#{h.anchor}">{html.escape(h.text)}</a></li>' for h in page.headings)
            items.append(f"<ul>{''.join(sections)}</ul>")
        items.append("</li>")
    return items

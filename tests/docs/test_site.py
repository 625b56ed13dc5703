"""The built site (`make docs`): its links, its search, and what it asks of other hosts."""

from __future__ import annotations

import functools
import html
import http.server
import importlib.util
import json
import os
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from tests.browser import PROGRAM, Browser, browser

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build/site"
pytestmark = pytest.mark.docs


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(given["href"])


@functools.cache
def pages() -> dict[Path, Links]:
    found = {path: Links(path) for path in SITE.rglob("*.html")}
    assert found, "there is no site: make docs"
    return found


def target(page: Path, link: str) -> Path:
    path = unquote(urlsplit(link).path)
    found = (page.parent / path).resolve() if path else page
    return found / "index.html" if found.is_dir() else found


def test_no_link_is_broken() -> None:
    broken = []
    for page, links in pages().items():
        if page.name == "404.html":  # its links begin at the site's address, which is a placeholder
            continue
        for link in [*links.links, *links.loaded]:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            there, anchor = target(page, link), unquote(urlsplit(link).fragment)
            if not there.exists() or (anchor and there.suffix == ".html" and anchor not in pages()[there].anchors):
                broken.append(f"{page.relative_to(SITE)}: {link}")
    assert broken == []


def test_pages_load_nothing_from_other_hosts() -> None:
    foreign = {link for links in pages().values() for link in links.loaded if urlsplit(link).netloc}
    assert foreign == set()


def text_of(entry: dict[str, str]) -> str:
    words = re.sub(r"<[^>]+>", " ", f"{entry['title']} {entry['text']}")
    return " ".join(html.unescape(words).split())


@functools.cache
def searched() -> str:
    index = json.loads((SITE / "search/search_index.json").read_text())
    return "\n".join(text_of(entry) for entry in index["docs"])


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_search_has_every_message() -> None:
    listed: dict[str, list[str]] = hooks().messages()
    texts = [" ".join(text.split()) for module in listed.values() for text in module]
    assert len(texts) > 200
    words = re.sub(r"[\s`]", "", searched())  # spaces beside markup, and marks of code, are not in the index
    assert [text for text in texts if re.sub(r"[\s`]", "", text) not in words] == []


def steps_from(start: Path, clicks: int) -> set[Path]:
    """Return the pages that so many clicks reach, in the page's own text or in its navigation."""
    reached = {start}
    for _ in range(clicks):
        links = [(page, link) for page in reached if page in pages() for link in pages()[page].links]
        reached |= {target(page, link) for page, link in links if not urlsplit(link).scheme}
    return reached


@pytest.mark.parametrize(
    ("question", "page", "answer"),
    [
        ("can my pipeline, on my GPUs?", "compatibility", "Can my pipeline run, on my GPUs?"),
        ("which mode and n?", "choosing", "You want"),
        ("how do I serve it?", "serving", "drp serve digits"),
        ("it failed with this message", "troubleshooting", "By message"),
    ],
)
def test_a_question_is_answered_within_two_clicks(question: str, page: str, answer: str) -> None:
    there = SITE / page / "index.html"
    assert there in steps_from(SITE / "index.html", 2)
    assert answer in html.unescape(re.sub(r"<[^>]+>", "", there.read_text()))
    assert f"docs/{page}.md" in (ROOT / "README.md").read_text()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    if PROGRAM is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no Chromium")
    with browser() as opened:
        yield opened


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("n drafts per round", "(glossary|algorithm|drafts|choosing)/"),
        ("cannot be imported by a worker", "troubleshooting/"),
        ("label is out of range; this model has the classes", "troubleshooting/"),
    ],
)
def test_the_search_finds(words: str, where: str, page: Browser, address: str) -> None:
    page.go(f"{address}/?q={words.replace(' ', '+')}")
    results = "[...document.querySelectorAll('.md-search-result__link')].map(each => each.getAttribute('href'))"
    page.until(f"{results}.length > 0")
    page.until(f"{results}.some(each => /{where.replace('/', chr(92) + '/')}/.test(each))")

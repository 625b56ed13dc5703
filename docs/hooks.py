"""Hooks of the site: links to files outside docs/, formulas, and the list of error messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUTSIDE = "repository"
"""Folder of the site for files of the repository that pages link to."""
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)((?:#[^)\s]*)?\))")
MESSAGES = "<!-- messages -->"
INCLUDE = re.compile(r"<!-- include (\S+) -->")
"""A page that is a file of the repository, by its path there."""
BOOSTS = {"glossary.md": 8, "troubleshooting.md": 4, "api": 0.5, "changelog.md": 0.3, OUTSIDE: 0.2}
"""Where the search looks first, by page or folder."""
PAGES = (".md", ".ipynb")
PICTURES = (".png", ".svg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what those pages link to in turn."""
    waiting = sorted(DOCS.rglob("*.md"))
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in _outside(page):
            if target not in seen:
                seen.add(target)
                files.append(_file(target, config))
                if target.suffix == ".md":
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the copies, turn formulas into MathML, and list the messages."""
    page.meta.setdefault("search", {"boost": BOOSTS.get(page.file.src_uri.split("/")[0], 1)})
    source = _source_of(page.file)
    if MESSAGES in markdown:
        markdown = markdown.replace(MESSAGES, messages_page())
    depth = page.file.src_uri.count("/")

    def include(match: re.Match[str]) -> str:
        included = ROOT / match[1]
        return _with_links(included.read_text(), included.parent, depth)

    if source.suffix == ".md":
        markdown = INCLUDE.sub(include, _with_links(markdown, source.parent, depth))
    return _with_formulas(markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a notebook's links to other pages at these; in Markdown mkdocs does it."""
    if page.file.src_uri.endswith(".ipynb"):
        return re.sub(r'href="([\w-]+)\.md"', r'href="../\1/"', html)
    return html


def _with_links(markdown: str, folder: Path, depth: int) -> str:
    """Point links that are relative to `folder` at the site's copies, for a page that lies `depth` folders down."""

    def there(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]
        uri = target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else _uri(target)
        return f"{match[1]}{'../' * depth}{uri}{match[3]}"

    return LINK.sub(there, markdown)


def _outside(page: Path) -> Iterator[Path]:
    """Yield the files and folders of the repository, outside docs/, that a page links to."""
    text = page.read_text()
    for included in INCLUDE.findall(text):
        yield from _outside(ROOT / included)
    for _, link, _ in LINK.findall(text):
        target = (page.parent / link).resolve()
        if target.exists() and target.is_relative_to(ROOT) and not target.is_relative_to(DOCS):
            yield target


def _uri(target: Path) -> str:
    """Return where a file of the repository is in the site: source code is shown on a page of its own."""
    path = f"{OUTSIDE}/{target.relative_to(ROOT).as_posix()}"
    if target.is_dir():
        return f"{path}/index.md"
    return path if target.suffix in (*PAGES, *PICTURES, ".json") else f"{path}.md"


def _file(target: Path, config: MkDocsConfig) -> File:
    uri = _uri(target)
    if target.is_dir():
        names = sorted(each.name for each in target.iterdir() if each.name != "__pycache__")
        text = f"# {target.relative_to(ROOT)}/\n\nThis folder of the repository holds:\n\n" + "".join(
            f"- `{name}`\n" for name in names
        )
        return File.generated(config, uri, content=text)
    if uri.endswith(".md") and target.suffix != ".md":
        language = {".py": "python", ".hpp": "cpp", ".h": "c"}.get(target.suffix, "text")
        text = f"# {target.relative_to(ROOT)}\n\n```{language}\n{target.read_text().rstrip()}\n```\n"
        return File.generated(config, uri, content=text)
    return File.generated(config, uri, abs_src_path=str(target))


def _source_of(file: File) -> Path:
    """Return the file of the repository that a page is made of."""
    if file.src_uri.startswith(f"{OUTSIDE}/"):
        return ROOT / file.src_uri.removeprefix(f"{OUTSIDE}/")
    return DOCS / file.src_uri


def _with_formulas(markdown: str) -> str:
    """Turn $$...$$ and $`...`$ into MathML, which browsers show without a script."""

    def display(match: re.Match[str]) -> str:
        return convert(match[1].strip(), display="block")

    def inline(match: re.Match[str]) -> str:
        return convert(match[1].strip())

    markdown = re.sub(r"\$\$(.+?)\$\$", display, markdown, flags=re.DOTALL)
    return re.sub(r"\$`(.+?)`\$", inline, markdown)


def messages() -> dict[str, list[str]]:
    """Return the messages of the errors that drp raises, by module; values are written as `…`."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "drp").rglob("*.py")):
        texts: list[str] = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _text(node.exc.args[-1])
                if text.count(" ") > 2 and text not in texts:
                    texts.append(text)
        if texts:
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = texts
    return found


def _text(node: ast.expr) -> str:
    """Return the text of a string, formatted or not; empty for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "…"
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def messages_page() -> str:
    """Return the list of all messages. Each is a heading of its own, which is what the search finds."""
    parts: list[str] = []
    for module, texts in messages().items():
        for text in texts:
            line = " ".join(text.split())
            parts.append(f'<h4 id="message-{len(parts)}">{escape(line, quote=False)}</h4>\n<p>raised in {module}</p>\n')
    return "\n".join(parts)

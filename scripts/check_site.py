"""Check the built site for what Sphinx does not: links, anchors, alternative texts, requests to other hosts.

Needs the standard library only. Prints one line per problem, and exits with status 1 if there is any.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"

# Attributes that make a browser fetch something when the page opens.
FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
FETCHED_RELS = {"stylesheet", "icon", "shortcut", "preload", "modulepreload", "prefetch", "preconnect", "manifest"}
IN_CSS = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")
# Sphinx fills a missing alternative text with the path of the image.
FILE_NAME = re.compile(r"\S*\.(png|svg|jpe?g|gif|webp)", re.IGNORECASE)


class Page(HTMLParser):
    """What one page links to, fetches, shows and can be linked at."""

    def __init__(self) -> None:
        """Start with nothing noted."""
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.images: list[tuple[str, str | None]] = []
        self.in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        attributes = dict(attrs)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "meta" and attributes.get("http-equiv", "").lower() == "refresh":
            self.links.append(attributes["content"].partition("url=")[2].strip("'\""))
        if tag == "img":
            self.images.append((attributes.get("src") or "", attributes.get("alt")))
        if tag in FETCHED and attributes.get(FETCHED[tag]):
            self.fetched.append(attributes[FETCHED[tag]])
        if tag == "link" and FETCHED_RELS & set((attributes.get("rel") or "").split()):
            self.fetched.append(attributes.get("href") or "")
        self.in_style = tag == "style"

    def handle_data(self, data: str) -> None:
        """Note what a style sheet in the page fetches."""
        if self.in_style:
            self.fetched += _in_css(data)


def _in_css(text: str) -> list[str]:
    return [a or b for a, b in IN_CSS.findall(text) if not (a or b).startswith("data:")]


def _is_elsewhere(url: str) -> bool:
    return bool(urlsplit(url).netloc)


def _file_of(page: Path, path: str) -> Path:
    target = (SITE / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve() if path else page
    return target / "index.html" if target.is_dir() else target


def html_files() -> list[Path]:
    """Return the pages of the site; the themes keep templates under _static."""
    return sorted(path for path in SITE.rglob("*.html") if path.relative_to(SITE).parts[0] != "_static")


def pages_in_toc() -> list[str]:
    """Return the documents that _toc.yml names."""
    return re.findall(r"^\s*-?\s*(?:root|file):\s*([^\s#]+)", (ROOT / "_toc.yml").read_text(), re.MULTILINE)


def check() -> list[str]:
    """Return the problems of the site, one line each."""
    pages: dict[Path, Page] = {}
    for path in html_files():
        pages[path] = Page()
        pages[path].feed(path.read_text())
    problems = [
        f"_toc.yml: {document} has no page"
        for document in pages_in_toc()
        if not (SITE / document).with_suffix(".html").exists()
    ]
    for path, page in pages.items():
        where = path.relative_to(SITE)
        for url in sorted(set(page.links)):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target, anchor = _file_of(path, unquote(parts.path)), unquote(parts.fragment)
            if not target.exists():
                problems.append(f"{where}: link to {url}, which does not exist")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                problems.append(f"{where}: link to {url}, which has no such anchor")
        for url in page.fetched:
            if _is_elsewhere(url):
                problems.append(f"{where}: fetches {url} from another host")
            elif not url.startswith("data:") and not _file_of(path, unquote(urlsplit(url).path)).exists():
                problems.append(f"{where}: fetches {url}, which does not exist")
        for source, text in page.images:
            if not (text or "").strip():
                problems.append(f"{where}: image {source} has no alternative text")
            elif FILE_NAME.fullmatch(text.strip()):
                problems.append(f"{where}: image {source} has a file name for an alternative text")
    for path in sorted(SITE.rglob("*.css")):
        for url in _in_css(path.read_text(errors="replace")):
            if _is_elsewhere(url):
                problems.append(f"{path.relative_to(SITE)}: fetches {url} from another host")
    return problems


def main() -> int:
    """Print the problems and return the exit status."""
    if not (SITE / "index.html").exists():
        print(f"there is no site in {SITE}: run 'make book' first")
        return 2
    problems = check()
    for problem in problems:
        print(problem)
    count = len(html_files())
    print(f"{len(problems)} problem{'' if len(problems) == 1 else 's'} in {count} pages")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

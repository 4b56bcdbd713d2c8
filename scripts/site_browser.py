"""The built site in a browser: its pages, a static host for it, and the Chromium of this computer.

make_pdf.py and the tests of the site share it. No browser is ever downloaded.
"""

from __future__ import annotations

import functools
import gzip
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from playwright.sync_api import Browser, Playwright

ROOT = Path(__file__).resolve().parent.parent
# Another folder may be looked at while a site is being built.
SITE = Path(os.environ.get("OPDLAB_SITE", ROOT / "_build" / "html"))

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
# Where the installers of macOS and Windows put it.
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)
NO_CHROMIUM = (
    "Chromium or Chrome: install it (Debian: apt-get install chromium; macOS: brew install --cask google-chrome) "
    "or name it in CHROMIUM"
)
# What static hosts (GitHub Pages among them) send compressed; pictures and fonts are compressed already.
TEXT = {".html", ".css", ".js", ".svg", ".json", ".txt", ".ipynb", ".md", ".map"}


def table_of_contents() -> list[tuple[str, list[str]]]:
    """Return the parts of the book, caption and pages; the first, without a caption, is the front page."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [("", [toc["root"]])] + [(part["caption"], [c["file"] for c in part["chapters"]]) for part in toc["parts"]]


def launch(playwright: Playwright, path: str, *arguments: str) -> Browser:
    """Start the Chromium or Chrome at ``path``, without a window."""
    # Root, as in a container, has no sandbox.
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return playwright.chromium.launch(executable_path=path, args=[*arguments, *root])


def chromium() -> str | None:
    """Return the path of the Chromium or Chrome to use, or None if there is none."""
    if named := os.environ.get("CHROMIUM"):
        return named
    found = (*map(shutil.which, NAMES), *(place for place in PLACES if Path(place).exists()))
    return next(filter(None, found), None)


@functools.cache
def _content(path: Path) -> tuple[bytes, bool]:
    data = path.read_bytes()
    return (gzip.compress(data), True) if path.suffix in TEXT else (data, False)


class _StaticHost(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections, as hosts do

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Send a file, compressed where that pays."""
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        found = path.is_file()
        data, compressed = _content(path) if found else (b"", False)
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", self.guess_type(str(path)))
        if compressed:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on this computer alone while the block runs, and give its address, which ends in "/"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_StaticHost, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""Print the built site as one PDF: every page of the table of contents, with bookmarks by part and chapter.

Chromium prints what a reader would print, by the style sheet for paper; no LaTeX. Usage: make_pdf.py [OUT.pdf]
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import yaml
from playwright.sync_api import Page, sync_playwright
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, NameObject
from site_browser import NO_CHROMIUM, ROOT, SITE, chromium, launch, serve, table_of_contents
from tqdm import tqdm

OUT = ROOT / "_build" / "opdlab.pdf"

# Formulas are set and all pictures fetched, also those that wait until the reader comes near.
READY = """async book => {
    await window.MathJax?.startup?.promise;
    const pictures = [...document.querySelectorAll('article img')];
    for (const picture of pictures) picture.loading = 'eager';
    await Promise.all(pictures.filter(picture => !picture.hidden).map(picture => picture.decode()));
    await document.fonts.ready;
    for (const solution of document.querySelectorAll('.tag_hide-cell details')) solution.open = true;
    // Links to other pages lead to the published ones, not to this computer.
    const here = new URL('..', location.href).href, page = location.href.split('#')[0];
    for (const link of document.querySelectorAll('a[href]'))
        if (link.href.startsWith(here) && link.href.split('#')[0] !== page)
            link.href = book + link.href.slice(here.length);
    return document.querySelector('article h1').innerText.replace(/#$/, '').trim();
}"""
MARGINS = {"top": "16mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}
FOOT = (
    '<div style="width: 100%; margin: 0 16mm; font: 8pt sans-serif; color: #555; text-align: {}">'
    '<span class="{}"></span></div>'
)


def print_page(page: Page, foot: str) -> PdfReader:
    """Return the PDF of what a page shows."""
    printed = page.pdf(
        format="A4",
        margin=MARGINS,
        print_background=True,
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=foot,
    )
    return PdfReader(io.BytesIO(printed))


def number(book: PdfWriter, page: Page) -> None:
    """Put the numbers of the sheets at their feet: Chromium counts from one in every chapter."""
    page.set_content('<div style="break-after: page">&nbsp;</div>' * (len(book.pages) - 1) + "&nbsp;")
    for sheet, numbered in zip(book.pages, print_page(page, FOOT.format("right", "pageNumber")).pages, strict=True):
        sheet.merge_page(numbered)
        sheet.compress_content_streams()


def lead_within(book: PdfWriter, published: str, starts: dict[str, int]) -> None:
    """Let links to the pages of the book lead to where they begin in the PDF."""
    for page in book.pages:
        for annotation in page.get("/Annots", []):
            link = annotation.get_object()
            action = link.get("/A", {})
            target = str(action.get("/URI", "")).removeprefix(published).partition("#")[0].removesuffix(".html")
            if target in starts:
                del link[NameObject("/A")]
                link[NameObject("/Dest")] = ArrayObject(
                    [book.pages[starts[target]].indirect_reference, NameObject("/Fit")]
                )


def main() -> int:
    """Print the site and return the exit status."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    if not (SITE / "index.html").exists():
        print(f"there is no site in {SITE}: run 'make book' first")
        return 2
    path = chromium()
    if not path:
        print(f"the PDF needs {NO_CHROMIUM}")
        return 2
    began, parts, book, starts = time.perf_counter(), table_of_contents(), PdfWriter(), {}
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    published = config["html"]["baseurl"]
    with (
        serve(SITE) as host,
        sync_playwright() as playwright,
        tqdm(total=sum(len(pages) for _, pages in parts), desc="printing", unit="page") as bar,
    ):
        browser = launch(playwright, path)
        page = browser.new_page(color_scheme="light")
        page.set_default_timeout(180_000)  # of a busy machine
        for caption, names in parts:
            above = None
            for name in names:
                page.goto(f"{host}{name}.html", wait_until="load")
                title = page.evaluate(READY, published)
                start = starts[name] = len(book.pages)
                book.append(print_page(page, FOOT.format("left", "title")), import_outline=False)
                if caption and above is None:
                    above = book.add_outline_item(title=caption, page_number=start)
                book.add_outline_item(title=title, page_number=start, parent=above)
                bar.update()
        number(book, page)
        browser.close()
    lead_within(book, published, starts)
    book.compress_identical_objects()
    book.add_metadata({"/Title": config["title"], "/Author": config["author"]})
    out.parent.mkdir(parents=True, exist_ok=True)
    book.write(out)
    megabytes, seconds = out.stat().st_size / 1e6, time.perf_counter() - began
    print(f"{out}: {len(book.pages)} pages, {megabytes:.1f} MB, in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Execute the chapters and store their outputs in them: the site shows them as they are stored.

Every code cell runs, top to bottom, in a fresh kernel. What is written depends on the sources and the results only (no
times, machine paths or random ids), so executing twice gives the same bytes. A notebook that fails stays as it was.
Figures are stored in 128 colours, which is a third of the bytes, and those that a phone cannot show in its width a
second time, for the site only (scripts/stacked_figures.py).
When, where and how fast each was executed is noted in data/status.json.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import date
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image, ImageChops, ImageStat
from tqdm import tqdm

from opdlab.models.files import write_json
from opdlab.processes import provenance

SCRIPTS = Path(__file__).resolve().parent
BOOK = SCRIPTS.parent / "book"
STATUS = BOOK.parent / "data" / "status.json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "name": "python", "pygments_lexer": "ipython3"},
}
# The keys of a cell that the site, the tests and the readers' notebooks use.
CELL_METADATA = ("mystnb", "tags")
# The tags of cells whose code is folded on the site; JupyterLab and Colab fold it by entries of their own.
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
FOLDS = {"jupyter": {"source_hidden": True}, "cellView": "form"}
# One state of a bar of tqdm; or the empty line at its end.
BAR = re.compile(r"\s*|.*(\d+%\|.*\||\d+\w* \[\d\d:\d\d).*")
COLOURS = 128
# A colour with this many pixels is seen as an area; with fewer it is one of the shades along an edge.
AREA = 100
# Letters alone have up to 254 greys; a colour bar has as many shades again, and would show steps in fewer.
MOST_AREAS = 300
LARGEST_ERROR = 0.5  # mean over all pixels, of 255


class ChapterError(Exception):
    """A chapter could not be executed, said in one sentence."""


def name_cells(notebook: nbformat.NotebookNode) -> None:
    """Give each cell an id made of its source, so that inserting a cell leaves the ids of the others alone."""
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"


def fewer_colours(png: bytes) -> bytes:
    """Return a PNG picture in 128 colours, the same bytes every time.

    Median cut keeps the colours of large areas, so that overlapping bands do not change their hue, and the k-means
    steps after it bring the rest closer; dithering would speckle flat areas. A picture that this would harm keeps its
    full colour: one with a gradient, or one whose mean error is too large. A picture with transparent parts, or with a
    palette, is returned as it is.
    """
    picture = Image.open(BytesIO(png))
    if picture.mode == "P" or (picture.mode == "RGBA" and picture.getextrema()[3] != (255, 255)):
        return png
    full = picture.convert("RGB")
    reduced = full.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=2)
    areas = sum(count >= AREA for count, _ in full.getcolors(full.width * full.height))
    error = max(ImageStat.Stat(ImageChops.difference(full, reduced.convert("RGB"))).mean)
    stored = BytesIO()
    (full if areas > MOST_AREAS or error > LARGEST_ERROR else reduced).save(stored, format="png", optimize=True)
    return stored.getvalue()


def pictures_of(output: nbformat.NotebookNode) -> Iterator[tuple[dict[str, str], str]]:
    """Yield where the pictures of an output are: the one that every reader shows, and the one for narrow screens."""
    if "image/png" in output.get("data", {}):
        yield output.data, "image/png"
        if "stacked" in output.metadata.get("image/png", {}):
            yield output.metadata["image/png"].stacked, "data"


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Drop what depends on the machine, the clock or the editor, and the progress bars; make the figures small."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in CELL_METADATA})
        if cell.cell_type == "code":
            if FOLDED & set(cell.metadata.get("tags", ())):
                cell.metadata |= nbformat.from_dict(FOLDS)
            cell.outputs = [output for output in cell.outputs if not _is_bar(output)]
            for output in cell.outputs:
                for place, key in pictures_of(output):
                    png = fewer_colours(base64.b64decode(place[key]))
                    place[key] = base64.b64encode(png).decode()
    name_cells(notebook)


def _is_bar(output: nbformat.NotebookNode) -> bool:
    if output.output_type != "stream" or output.name != "stderr":
        return False
    return all(BAR.fullmatch(line) for line in re.split(r"[\r\n]", output.text))


def execute(path: Path, bar: tqdm) -> bool:
    """Execute one notebook in place, in its own folder, and tell whether its file changed.

    Raises:
        ChapterError: if a cell fails, takes too long, or leaves a warning behind.
    """
    before = path.read_bytes()
    notebook = nbformat.reads(before.decode(), as_version=4)
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Cells are counted as the reader sees them: In [1], In [2], ...
    number = {id(cell): i for i, cell in enumerate(code_cells, start=1)}
    running = 0

    def on_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
        nonlocal running
        running = number.get(id(cell), running)

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.extensions=stacked_figures"],
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=on_start,
        on_cell_executed=lambda cell, cell_index, execute_reply: bar.update(),
    )
    paths = str(SCRIPTS), os.environ.get("PYTHONPATH")
    try:
        client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    except CellExecutionError as problem:
        raise ChapterError(f"{path.name}, code cell {running}: {problem.ename}: {problem.evalue}") from problem
    except CellTimeoutError as problem:
        raise ChapterError(f"{path.name}, code cell {running}: took more than {client.timeout} s") from problem
    except DeadKernelError as problem:
        raise ChapterError(
            f"{path.name}, code cell {running}: the kernel died, perhaps for lack of memory"
        ) from problem
    normalise(notebook)
    for cell in code_cells:
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                text = output.text.strip().splitlines()[0]
                raise ChapterError(f"{path.name}, code cell {number[id(cell)]}: wrote to stderr: {text}")
    after = (nbformat.writes(notebook) + "\n").encode()
    if after == before:
        return False
    # Whole or not at all, should the machine stop now.
    temporary = path.with_suffix(".ipynb.part")
    temporary.write_bytes(after)
    temporary.replace(path)
    return True


def note_status(path: Path, scale: str, seconds: float) -> None:
    """Note when, where and how fast a chapter was executed, for the status page."""
    status = json.loads(STATUS.read_text()) if STATUS.exists() else {}
    when = {"executed": date.today().isoformat(), "seconds": round(seconds, 1), "scale": scale}
    status[path.name] = when | provenance()
    # What is no page any more has no status.
    write_json(STATUS, {name: status[name] for name in sorted(status) if (BOOK / name).is_file()})


def export_hero() -> None:
    """Write the first figure of the landing page to the file that the README shows."""
    notebook = nbformat.read(BOOK / "index.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    figure = next(output.data["image/png"] for output in outputs if "image/png" in output.data)
    (BOOK / "images").mkdir(exist_ok=True)
    (BOOK / "images" / "hero.png").write_bytes(base64.b64decode(figure))


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook in book/")
    parser.add_argument("--scale", default="tiny", help="the scale of the runs in the chapters (default: tiny)")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.notebooks] or sorted(BOOK.glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            print(f"there is no notebook {path}", file=sys.stderr)
            return 2
    os.environ |= {
        "OPDLAB_SCALE": options.scale,
        # One thread: sums keep their order, so numbers keep their last digits.
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    cells = sum(
        cell.cell_type == "code" for path in paths for cell in nbformat.read(path, as_version=4).cells if cell.source
    )
    with tqdm(total=cells, unit="cell") as bar:
        for path in paths:
            bar.set_description(path.name)
            began = time.perf_counter()
            try:
                changed = execute(path, bar)
            except ChapterError as problem:
                bar.close()
                print(f"{problem}; the file is as it was", file=sys.stderr)
                return 1
            bar.write(f"{path.name}: {'written' if changed else 'unchanged'}")
            note_status(path, options.scale, time.perf_counter() - began)
            if path == BOOK / "index.ipynb":
                export_hero()
    return 0


if __name__ == "__main__":
    sys.exit(main())

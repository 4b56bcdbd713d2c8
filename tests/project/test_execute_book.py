"""scripts/execute_book.py: what it makes of the figures of a chapter."""

import base64
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

SCRIPT = "scripts/execute_book.py"
NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "book").glob("*.ipynb"))


def png(pixels):
    stored = BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(stored, format="png")
    return stored.getvalue()


def pixels(data):
    return np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture
def figure():
    """Four flat areas, and an edge of 300 shades that are a pixel each."""
    rng = np.random.default_rng(0)
    picture = np.full((200, 200, 4), 255)
    picture[50:100, :, :3] = 229, 227, 224  # two bands, one over the other: the greys of the one below must stay grey
    picture[100:150, :, :3] = 213, 94, 0
    picture[150:, :100, :3] = 0, 158, 115
    picture[49, :150, :3] = rng.integers(0, 256, (150, 3))
    picture[99, :150, :3] = rng.integers(0, 256, (150, 3))
    return picture


def test_a_figure_has_128_colours_and_its_areas_keep_theirs(script, figure):
    small = script.fewer_colours(png(figure))
    assert Image.open(BytesIO(small)).mode == "P" and len(np.unique(pixels(small).reshape(-1, 3), axis=0)) <= 128
    flat = np.ones((200, 200), dtype=bool)
    flat[[49, 99]] = False
    assert np.abs(pixels(small) - figure[..., :3])[flat].max() <= 1


def test_it_gives_the_same_bytes_every_time_and_changes_nothing_twice(script, figure):
    small = script.fewer_colours(png(figure))
    assert script.fewer_colours(png(figure)) == small == script.fewer_colours(small)


def test_gradients_noise_and_transparent_parts_keep_their_colours(script, figure):
    bar = np.zeros((64, 400, 3))
    bar[..., 0], bar[..., 1] = np.minimum(np.arange(400), 255), np.maximum(np.arange(400) - 255, 0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    for picture in (np.repeat(bar, 2, axis=0), noise):
        kept = script.fewer_colours(png(picture))
        assert (pixels(kept) == picture).all()
        assert script.fewer_colours(kept) == kept
    figure[:10, :, 3] = 0
    assert script.fewer_colours(png(figure)) == png(figure)


def test_the_executor_stores_small_figures(script, figure):
    output = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(png(figure)).decode()})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("plot()", outputs=[output])])
    script.normalise(notebook)
    stored = base64.b64decode(notebook.cells[0].outputs[0].data["image/png"])
    assert stored == script.fewer_colours(png(figure))


def test_a_figure_of_two_panels_has_a_second_picture_and_twice_gives_the_same_bytes(script, tmp_path):
    cells = [
        "from opdlab.figures.style import panels, plt, use_style\nuse_style()",
        "figure, axes = panels(2, width=4.3, height=3)\nfor axis in axes: axis.plot([1, 2])\nplt.show()",
        "figure, (axis,) = panels(1, width=4, height=3)\naxis.plot([1, 2])\nplt.show()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path = tmp_path / "chapter.ipynb"
    nbformat.write(notebook, path)
    with tqdm(disable=True) as bar:
        assert script.execute(path, bar)
        assert not script.execute(path, bar)
    none, two, one = nbformat.read(path, as_version=4).cells
    assert none.outputs == []
    sizes = [cell.outputs[0].metadata["image/png"] for cell in (two, one)]
    second = sizes[0].pop("stacked")
    assert sizes == [{"width": pytest.approx(870, abs=15), "height": pytest.approx(310, abs=15)},
                     {"width": pytest.approx(410, abs=15), "height": pytest.approx(310, abs=15)}]  # fmt: skip
    assert second["panels"] == 2
    assert second["width"] == pytest.approx(380, abs=15) and second["height"] == pytest.approx(610, abs=15)
    stored = base64.b64decode(second["data"])
    assert Image.open(BytesIO(stored)).size == pytest.approx((2 * second["width"], 2 * second["height"]), abs=1)
    assert script.fewer_colours(stored) == stored and Image.open(BytesIO(stored)).mode == "P"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_figures_of_the_book_are_stored_small(script, path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            for place, key in script.pictures_of(output):
                data = base64.b64decode(place[key])
                assert script.fewer_colours(data) == data

"""A figure with a slider: one picture per step, all of them in the page itself, so that it works without a server."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO

import matplotlib.pyplot as plt
from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image

from opdlab.errors import OpdlabError

# The handlers stand in the elements, because not every editor runs the scripts of a notebook's output. All pictures but
# the one in view are hidden, from screen readers too; the slider says in words which step it is at.
_SHOW = (
    "const box = this.closest('.steppable'), slider = box.querySelector('input');"
    "{move}"
    "box.querySelectorAll('img').forEach((picture, i) => picture.hidden = i != slider.value);"
    "const shown = box.querySelectorAll('img')[slider.value].dataset.label;"
    "box.querySelector('output').textContent = shown; slider.setAttribute('aria-valuetext', shown);"
)


def slider(frames: Sequence[tuple[Figure, str, str]], caption: str, *, start: int = 0) -> HTML:
    """Return a figure that is stepped through with a slider, and close the figures that it is made of.

    A frame is a figure, the label beside the slider, and the text for readers who cannot see the figure; all figures
    have one size. The caption is plain text; ``start`` is the frame that is shown at first, and on paper.

    Raises:
        OpdlabError: if there is no frame ``start``.
    """
    if not 0 <= start < len(frames):
        raise OpdlabError(f"start is {start}, but there are {len(frames)} frames")
    pictures = "".join(
        f'<img src="data:image/png;base64,{_png(figure)}" alt="{escape(alt)}" '
        f'style="max-width: 100%;" data-label="{escape(label)}"{"" if i == start else " hidden"}>'
        for i, (figure, label, alt) in enumerate(frames)
    )
    label = escape(frames[start][1])
    back, on = (
        f'<button type="button" aria-label="{word}" onclick="{_SHOW.format(move=move)}">{sign}</button>'
        for word, sign, move in (("earlier", "◀", "slider.stepDown();"), ("later", "▶", "slider.stepUp();"))
    )
    return HTML(
        f'<figure class="steppable" style="margin: 1em 0;">{pictures}'
        f'<div style="display: flex; gap: 0.75em; align-items: center; flex-wrap: wrap;">{back}'
        f'<input type="range" min="0" max="{len(frames) - 1}" value="{start}" aria-label="step of the figure" '
        f'aria-valuetext="{label}" style="flex: 1; min-width: 8em;" oninput="{_SHOW.format(move="")}">'
        f'{on}<output style="min-width: 12em;">{label}</output></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _png(figure: Figure) -> str:
    """Return a figure as PNG at twice its resolution, the same bytes whenever it is drawn, and close it."""
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=2 * figure.dpi)
    plt.close(figure)
    # A page holds many frames; with 128 colours a figure looks the same and takes a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE).save(
        small, format="png", optimize=True
    )
    return b64encode(small.getvalue()).decode()

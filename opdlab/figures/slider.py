"""A figure that is stepped through: one picture per step and a slider, all in the page, so that no server is needed."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

import matplotlib.pyplot as plt
from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image

from opdlab.errors import OpdlabError

# Handlers stand in the elements, for a notebook does not run the scripts of what it shows in every editor. Pictures but
# the one in view are hidden, also from screen readers; the slider says where it is in words.
_SHOW = (
    "const box = this.closest('.steppable'), slider = box.querySelector('input');"
    "{move}"
    "box.querySelectorAll('img').forEach((picture, i) => picture.hidden = i != slider.value);"
    "const shown = box.querySelectorAll('img')[slider.value].dataset.label;"
    "box.querySelector('output').textContent = shown; slider.setAttribute('aria-valuetext', shown);"
)


@dataclass(frozen=True)
class Frame:
    """One step: what is drawn, the words beside the slider, and what a reader who does not see it is told."""

    figure: Figure
    label: str
    alt: str


def steppable(frames: Sequence[Frame], caption: str, *, start: int = 0) -> HTML:
    """Return a figure with a slider over ``frames``; the figures are closed.

    Args:
        frames: in order; all figures of one size.
        caption: plain text under it that says what to see.
        start: the frame in view at first, and on paper.

    Raises:
        OpdlabError: if there is no frame ``start``.
    """
    if not 0 <= start < len(frames):
        raise OpdlabError(f"start is {start}, but there are {len(frames)} frames")
    pictures = []
    for i, frame in enumerate(frames):
        hidden = "" if i == start else " hidden"
        pictures.append(
            f'<img src="data:image/png;base64,{_png(frame.figure)}" alt="{escape(frame.alt)}" '
            f'style="max-width: 100%;" data-label="{escape(frame.label)}"{hidden}>'
        )
    label = escape(frames[start].label)
    back, on = (
        f'<button type="button" aria-label="{word}" onclick="{_SHOW.format(move=move)}">{sign}</button>'
        for word, sign, move in (("earlier", "◀", "slider.stepDown();"), ("later", "▶", "slider.stepUp();"))
    )
    return HTML(
        '<figure class="steppable" style="margin: 1em 0;">'
        + "".join(pictures)
        + '<div style="display: flex; gap: 0.75em; align-items: center; flex-wrap: wrap;">'
        + back
        + f'<input type="range" min="0" max="{len(frames) - 1}" value="{start}" aria-label="step of the figure" '
        + f'aria-valuetext="{label}" style="flex: 1; min-width: 8em;" oninput="{_SHOW.format(move="")}">'
        + on
        + f'<output style="min-width: 12em;">{label}</output></div>'
        + f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _png(figure: Figure) -> str:
    """Return a figure as PNG at double density, the same bytes whenever it is drawn, and close it."""
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=2 * figure.dpi)
    plt.close(figure)
    # A page holds many frames: 128 colours are enough for a figure, and a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE).save(
        small, format="png", optimize=True
    )
    return b64encode(small.getvalue()).decode()

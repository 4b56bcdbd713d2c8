"""A picture that moves: a still picture in the notebook, whose place a script takes where the page has one."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from pathlib import Path

from IPython.display import HTML


def explorable(still: Path | str, alt: str, caption: str) -> HTML:
    """Return a still picture that a script of the same name makes move: ``size.js`` for ``size.png``.

    The still is part of what is returned, so it is seen on paper, in a plain notebook and without scripts. The ``alt``
    text is for readers who cannot see it, the caption is plain text for all.
    """
    picture = b64encode(Path(still).read_bytes()).decode()
    return HTML(
        f'<figure class="explorable" data-name="{escape(Path(still).stem)}" style="margin: 1em 0;">'
        f'<img src="data:image/png;base64,{picture}" alt="{escape(alt)}" style="max-width: 100%;">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )

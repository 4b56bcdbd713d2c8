"""A picture that moves: a still picture in the notebook, whose place a script takes where the page has one."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from pathlib import Path

from IPython.display import HTML

from opdlab.errors import OpdlabError


def explorable(still: Path | str, alt: str, caption: str) -> HTML:
    """Return a still picture that a script of the same name makes move: ``size.js`` for ``size.png``.

    The still is part of what is returned, so it is seen on paper, in a plain notebook and without scripts. The ``alt``
    text is for readers who cannot see it, the caption is plain text for all.

    Raises:
        OpdlabError: if there is no still, or it is no PNG.
    """
    still = Path(still)
    picture = still.read_bytes() if still.is_file() else b""
    if not picture.startswith(b"\x89PNG"):
        raise OpdlabError(f"there is no PNG picture in {still}: make it first, or give the path of one")
    return HTML(
        f'<figure class="explorable" data-name="{escape(still.stem)}" style="margin: 1em 0;">'
        f'<img src="data:image/png;base64,{b64encode(picture).decode()}" alt="{escape(alt)}" style="max-width: 100%;">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )

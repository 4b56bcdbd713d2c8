"""The picture of the experiment: where each update starts, who writes, and who grades."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape
from typing import NamedTuple


class Lane(NamedTuple):
    """One way of going on from the anchor."""

    title: str
    colour: str
    writes: str  #: who writes the completions
    grades: str  #: who grades them, and how often


class Diagram(str):
    """A picture in SVG, which a notebook shows and which takes the page's own text colour."""

    def _repr_html_(self) -> str:
        return f'<figure class="diagram">{self}<figcaption>{_CAPTION}</figcaption></figure>'


_CAPTION = "Where each run starts, who writes its texts and who grades them. What this page is about is lit."
_WIDTH, _CARD, _GAP, _TOP = 480, 112, 10.7, 196


def draw_experiment(
    base: str, sft: str, anchor: str, lanes: Mapping[str, Lane], active: Collection[str] = ()
) -> Diagram:
    """Draw base, SFT and anchor, and below them a card for each arm that starts from the anchor.

    Args:
        base: what the base learned from.
        sft: what SFT imitates.
        anchor: what the model can do that all others start from.
        lanes: at most four, by arm; "sft" may be active, too.
        active: the arms that a page is about; the others are pale. All are, if none is named.
    """

    def group(name: str, *parts: str) -> str:
        return f'<g opacity="{1.0 if not active or name in active else 0.4}">{"".join(parts)}</g>'

    arrow = '<path d="M240 58V118l-4 -8h8l-4 8" stroke="currentColor"/>', _text(250, 92, sft, "start")
    parts = [group("base", _box(30, "base", base)), group("sft", *arrow)]
    parts.append(f'<g opacity="1.0">{_box(146, "anchor", anchor)}</g>')
    parts += [group(arm, _lane(i * (_CARD + _GAP), lane)) for i, (arm, lane) in enumerate(lanes.items())]
    said = "; ".join(f"{lane.title}: {lane.writes} writes, {lane.grades}" for lane in lanes.values())
    alt = f"From a base ({base}) SFT ({sft}) makes the anchor ({anchor}). From the anchor start: {said}."
    return Diagram(
        f'<svg viewBox="-2 2 {_WIDTH + 4} 362" role="img" aria-label="{escape(alt)}" width="100%" '
        f'style="max-width:{_WIDTH + 100}px" font-family="inherit" font-size="13" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _box(y: float, title: str, text: str) -> str:
    box = f'<rect x="60" y="{y - 26}" width="{_WIDTH - 120}" height="52" rx="8" fill="none" stroke="currentColor"/>'
    return box + _text(_WIDTH / 2, y - 5, title, bold=True) + _text(_WIDTH / 2, y + 14, text)


def _lane(x: float, lane: Lane) -> str:
    middle = x + _CARD / 2
    start = min(max(middle, 66), _WIDTH - 66)
    line = f'<path d="M{start:g} 172L{middle:g} {_TOP - 2}" stroke="{lane.colour}" stroke-width="2" fill="none"/>'
    card = (
        f'<rect x="{x:g}" y="{_TOP}" width="{_CARD}" height="140" rx="8" fill="{lane.colour}" fill-opacity="0.08" '
        f'stroke="{lane.colour}" stroke-width="2"/>'
    )
    words = _text(middle, _TOP + 24, lane.title, bold=True)
    for y, head, text in ((50, "writes", lane.writes), (96, "grades", lane.grades)):
        first, _, second = text.partition(", ")
        words += f'<g opacity="0.7" font-size="11">{_text(middle, _TOP + y, head)}</g>'
        words += _text(middle, _TOP + y + 16, first) + (_text(middle, _TOP + y + 31, second) if second else "")
    return line + card + words + _text(middle, _TOP + 162, "its update")

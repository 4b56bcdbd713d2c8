"""Draw the rooms of opdlab, with the modules in each, into book/images/architecture.svg.

The rooms and their order are the layers in pyproject.toml, which import-linter checks; the modules are the files. The
same code gives the same bytes.
"""

from __future__ import annotations

import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "opdlab"
PICTURE = ROOT / "book" / "images" / "architecture.svg"

WIDTH, NAMES_AT, GAP, LINE, PAD = 480, 110, 8, 18, 10
LETTERS = 46  # in a line of modules' names
DOOR = "and the door, opdlab itself"


def rooms() -> list[tuple[str, ...]]:
    """Return the rooms from top to bottom; those that stand side by side share a tuple."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [tuple(layer.split(" | ")) for layer in layers]


def modules(folder: Path) -> list[str]:
    """Return the modules in a folder by name; a folder in it is one name, with its own modules in brackets."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            names.append(path.stem)
        elif (path / "__init__.py").exists():
            names.append(f"{path.name} ({', '.join(modules(path))})")
    return names


def draw() -> str:
    """Return the picture as SVG."""
    parts, top = [], 0
    for layer in rooms():
        names = [name for room in layer if (PACKAGE / room).is_dir() for name in modules(PACKAGE / room)]
        lines = textwrap.wrap(", ".join(names), LETTERS) or [DOOR if layer == ("cli",) else ""]
        height = 2 * PAD + LINE * len(lines)
        # Light boxes with dark letters read on the light page and on the dark one.
        parts.append(
            f'<rect x="0" y="{top}" width="{WIDTH}" height="{height}" rx="6" fill="#eef3f7" stroke="#5b7a94"/>'
        )
        for x, line, style in [
            (PAD, [", ".join(layer)], 'font-weight="bold" fill="#12344d"'),
            (NAMES_AT, lines, 'fill="#222"'),
        ]:
            parts += [
                f'<text x="{x}" y="{top + PAD + 13 + LINE * i}" font-size="13" {style}>{escape(text)}</text>'
                for i, text in enumerate(line)
                if text
            ]
        top += height + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 {WIDTH + 2} {top - GAP + 2}" role="img" '
            f'width="{WIDTH + 2}" height="{top - GAP + 2}" font-family="Verdana, DejaVu Sans, sans-serif">',
            "<title>The rooms of opdlab and their modules: each imports only from those below it</title>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8", newline="\n")
    print(PICTURE.relative_to(ROOT))

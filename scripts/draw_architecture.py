"""Draw the groups of opdlab's modules, and which imports which, into book/images/architecture.svg.

The arrows are the imports in the code. One that follows from others is left out: if A imports B and B imports C, then
A may import C, too. The file says all of them in its metadata. Needs the standard library only; the same code gives
the same bytes.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "opdlab"
PICTURE = ROOT / "book" / "images" / "architecture.svg"

# Each group: row, columns that it fills, and its modules. Arrows lead one row down.
GROUPS: dict[str, tuple[int, tuple[int, ...], tuple[str, ...]]] = {
    "Command line": (0, (0,), ("cli",)),
    "Claims": (0, (1,), ("claims", "beside")),
    "Many GPUs": (1, (0,), ("engines",)),
    "Records": (1, (1,), ("records", "analyses", "reproduction")),
    "Your own models": (2, (0,), ("instrument", "compare", "callback", "collect", "summaries", "report")),
    "Training": (2, (1,), ("rollouts", "batches", "optimizers", "learner", "training")),
    "Figures and words": (3, (0,), ("plots", "steppable", "prose")),
    "Models and runs on disk": (3, (1,), ("checkpoints", "models", "fetch", "runs", "planning")),
    "What is learned": (4, (0, 1), ("tasks", "objectives", "signals", "constraints", "arms", "scales")),
    "Geometry": (5, (0, 1), ("geometry",)),
}
# Imported from everywhere, so arrows to them would say nothing.
EVERYWHERE = ("errors", "stats", "processes")

COLUMN, GAP, LINE, PAD = 212, 16, 16, 10
WIDTH = 2 * COLUMN + GAP
BETWEEN = 34  # rows, where the arrows are
LETTER = 7.6  # about the width of one in the modules' names
GREY = "#7d858c"  # of arrows: seen on white and on black


def modules() -> dict[str, list[Path]]:
    """Return the files of each module of opdlab, a package being one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """Return what a file imports of opdlab, by full name: modules, and what it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opdlab"):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("opdlab")}
    return found - {"opdlab"}


def edges() -> list[tuple[str, str]]:
    """Return which group imports which, in the order of the groups.

    Raises:
        ValueError: if a module is in no group, or a group lists one that does not exist.
    """
    files, group_of = modules(), {module: group for group, (_, _, of) in GROUPS.items() for module in of}
    known = {*group_of, *EVERYWHERE}
    if files.keys() != known:
        raise ValueError(
            f"GROUPS and the code differ in {', '.join(sorted(files.keys() ^ known))}: say where it belongs"
        )
    pairs = set()
    for module, paths in files.items():
        for imported in {name.split(".")[1] for path in paths for name in imports(path)}:
            if module in group_of and imported in group_of:
                pairs.add((group_of[module], group_of[imported]))
            elif module in EVERYWHERE and imported in group_of:
                raise ValueError(f"{module} imports {imported}, so it is not for everywhere: put it into a group")
    order = list(GROUPS)
    return sorted(((a, b) for a, b in pairs if a != b), key=lambda pair: (order.index(pair[0]), order.index(pair[1])))


def shown(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the edges that do not follow from others."""
    after = {group: {b for a, b in pairs if a == group} for group in GROUPS}

    def reached(group: str) -> set[str]:
        return set().union(*({other} | reached(other) for other in after[group]))

    return [(a, b) for a, b in pairs if not any(b in reached(other) for other in after[a])]


Box = tuple[float, float, float, float]  # left, top, width, height


def _lines(names: tuple[str, ...], width: float) -> list[str]:
    """Break the modules' names into lines of a box."""
    lines = [""]
    for name in names:
        longer = f"{lines[-1]}  {name}".strip()
        if len(longer) * LETTER > width and lines[-1]:
            lines.append(name)
        else:
            lines[-1] = longer
    return lines


def parts_of(module: str) -> tuple[str, ...]:
    """Return a module's name and, if it is a package, the public modules in it."""
    inside = [path.stem for path in sorted((PACKAGE / module).glob("*.py")) if not path.stem.startswith("_")]
    return (f"{module}:", *inside) if inside else (module,)


def place() -> tuple[dict[str, Box], dict[str, list[str]], float]:
    """Return the box of each group, the lines in it, and the height of all."""
    boxes, texts, top = {}, {}, 0.0
    for row in range(1 + max(row for row, _, _ in GROUPS.values())):
        beside = [group for group, (at, _, _) in GROUPS.items() if at == row]
        for group in beside:
            _, columns, names = GROUPS[group]
            width = len(columns) * (COLUMN + GAP) - GAP
            texts[group] = _lines(parts_of(names[0]) if len(names) == 1 else names, width - 2 * PAD)
            boxes[group] = (columns[0] * (COLUMN + GAP), top, width, 0.0)
        height = 2 * PAD + LINE * (1 + max(len(texts[group]) for group in beside))
        boxes |= {group: (*boxes[group][:3], height) for group in beside}
        top += height + BETWEEN
    return boxes, texts, top - BETWEEN


def ends(arrows: list[tuple[str, str]], boxes: dict[str, Box]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return where each arrow begins and ends, from the left: those at one box are spread over its width."""

    def spread(group: str, others: list[str]) -> dict[str, float]:
        left, _, width, _ = boxes[group]
        ordered = sorted(others, key=lambda other: boxes[other][0] + boxes[other][2] / 2)
        return {other: left + width * (i + 1) / (len(ordered) + 1) for i, other in enumerate(ordered)}

    begin = {a: spread(a, [other for group, other in arrows if group == a]) for a, _ in arrows}
    end = {b: spread(b, [other for other, group in arrows if group == b]) for _, b in arrows}
    # A box below several columns is met from straight above.
    wide = {group for group, box in boxes.items() if box[2] > COLUMN}
    return {(a, b): (begin[a][b], begin[a][b] if b in wide else end[b][a]) for a, b in arrows}


def draw() -> str:
    """Return the picture.

    Raises:
        ValueError: if an import does not lead down, or an arrow would cross a box.
    """
    pairs = edges()
    rows = {group: row for group, (row, _, _) in GROUPS.items()}
    for a, b in pairs:
        if rows[a] >= rows[b]:
            raise ValueError(
                f"{a!r} imports {b!r}, which is not below it: imports lead down, or they would go in circles"
            )
    arrows = shown(pairs)
    for a, b in arrows:
        if rows[b] != rows[a] + 1:
            raise ValueError(f"the arrow from {a!r} to {b!r} would cross a row: move one of them in GROUPS")
    boxes, texts, height = place()
    parts = []
    for (a, b), (begin, end) in ends(arrows, boxes).items():
        from_y, to_y = boxes[a][1] + boxes[a][3], boxes[b][1]
        parts.append(
            f'<line x1="{begin:g}" y1="{from_y:g}" x2="{end:g}" y2="{to_y - 1:g}" stroke="{GREY}" stroke-width="2" '
            'marker-end="url(#head)"/>'
        )
    for group, box in boxes.items():
        parts += _box(box, group, texts[group])
    note = (0.0, height + PAD, float(WIDTH), 2.0 * PAD + LINE - 2)
    parts += _box(note, "", [f"imported from everywhere: {', '.join(EVERYWHERE)}"])
    height = note[1] + note[3]
    facts = "\n".join(f"{a} -> {b}" for a, b in pairs)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 {WIDTH + 2:g} {height + 2:g}" role="img" '
            f'width="{WIDTH + 2:g}" height="{height + 2:g}" font-family="Verdana, DejaVu Sans, sans-serif">',
            "<title>The modules of opdlab in groups, and which group imports which</title>",
            f"<metadata>\n{escape(facts)}\n</metadata>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="5" markerHeight="5" '
            f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{GREY}"/></marker></defs>',
            *parts,
            "</svg>\n",
        ]
    )


def _box(box: Box, title: str, lines: list[str]) -> list[str]:
    """Return a box with a title, or a dashed one without, and lines."""
    left, top, width, height = box
    dash = "" if title else ' stroke-dasharray="4 3"'
    # Light with dark letters, on a ground that is the page's: so it reads in the light theme and in the dark one.
    parts = [
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="6" fill="#eef3f7" '
        f'stroke="#5b7a94"{dash}/>'
    ]
    x, y = left + PAD, top + PAD + 11
    if title:
        parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="13" font-weight="bold" fill="#12344d">{escape(title)}</text>'
        )
        y += LINE
    for line in lines:
        # Spaces that do not break keep the names apart.
        text = escape(line).replace("  ", "\u00a0 ")
        parts.append(f'<text x="{x:g}" y="{y:g}" font-size="12" fill="#222">{text}</text>')
        y += LINE
    return parts


def main() -> int:
    """Write the picture and return the exit status."""
    try:
        picture = draw()
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture, encoding="utf-8", newline="\n")
    print(f"{PICTURE.relative_to(ROOT)}: {len(edges())} imports between {len(GROUPS)} groups")
    return 0


if __name__ == "__main__":
    sys.exit(main())

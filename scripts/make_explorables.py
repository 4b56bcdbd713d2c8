"""Write what the pictures that move are made from: data as scripts, and the stills that stand in their place on paper.

They lie in book/_static/explore. The stills are computed by opdlab.geometry, from the same data as the pictures. The
runs must be there: opdlab record trains them. Usage: make_explorables.py
"""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from execute_book import fewer_colours
from explorable_data import (
    ALPHA,
    BLOCK,
    COLOURS,
    DATA,
    MARKERS,
    PART_SHOWN,
    SEED,
    SHUFFLED,
    SIZES,
    WHOLE_SHOWN,
    K,
    Runs,
    blocks,
    look,
    recorded_runs,
    rounded,
    script_of,
    subspace_data,
    token_data,
)
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from opdlab.geometry import (
    bf16_sparsity,
    frobenius,
    low_magnitude_mask,
    overlap,
    rotation,
    sim_k,
    stable_rank,
    svd,
    top_right,
    update_mask,
)
from opdlab.lab import plots

OUT = Path(__file__).resolve().parent.parent / "book" / "_static" / "explore"


def percent(share: float, _place: object = None) -> str:
    """Return a share in words."""
    return f"{100 * share:.3g} %"


def set_shares(axis: plt.Axes, ticks: Sequence[float]) -> None:
    """Make the horizontal axis a logarithmic one of relative norms."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(percent))
    axis.set_xlabel("size of the update")


def note_source(figure: Figure, words: str) -> None:
    """Write at the foot of a figure what it is of."""
    figure.supxlabel(words, fontsize=9, color="0.35")


def show_progress(axis: plt.Axes) -> None:
    """Make the horizontal axis that of the training's progress."""
    axis.set_xlabel("share of the training")
    axis.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axis.xaxis.set_major_formatter(FuncFormatter(percent))


def fifth(progress: Sequence[float]) -> int:
    """Return the first snapshot from a fifth of the training on, near the paper's first checkpoint."""
    return next(t for t, share in enumerate(progress) if share >= 0.2)


def line(arm: str) -> dict:
    """Return how the line of an arm is drawn; the shuffled update is a null."""
    return {"color": COLOURS[arm], "lw": 2.5 if arm == "sft_matched" else 1.3, "ls": "--" if arm == SHUFFLED else "-"}


def size_still(runs: Runs) -> Figure:
    """Draw the three diagnostics of the block at all sizes, and where training ended."""

    def measure(w0: Tensor, update: Tensor, size: float) -> list[float]:
        w1 = torch.add(w0, update, alpha=size * frobenius(w0) / frobenius(update))
        visible = update_mask(w0, w1)
        angle = float(rotation(w0, w1, K).right.mean())
        return [bf16_sparsity(w0, w1), overlap(low_magnitude_mask(w0, ALPHA), visible), angle]

    figure, axes = plots.panels(3, columns=3)
    sizes = SIZES[::3]
    for behind, (arm, (w0, update, _)) in enumerate(blocks(runs).items()):
        course = np.array([measure(w0, update, size) for size in sizes])
        own = frobenius(update) / frobenius(w0)
        for axis, values, end in zip(axes, course.T, measure(w0, update, own), strict=True):
            axis.plot(sizes, values, **line(arm))
            axis.plot(own, end, MARKERS[arm], color=COLOURS[arm], ms=7, label=look(arm)["label"], zorder=20 - behind)
    titles = ("unchanged in bf16", f"on the smallest {100 * ALPHA:g} %", f"top {K} directions turned by, in °")
    for axis, title in zip(axes, titles, strict=True):
        set_shares(axis, (0.0003, 0.001, 0.003, 0.01, 0.03))
        axis.set_title(title)
    for axis in axes[:2]:
        axis.yaxis.set_major_formatter(FuncFormatter(percent))
    plots.set_log(axes[2].yaxis)
    axes[2].yaxis.set_major_locator(FixedLocator([0.03, 0.1, 0.3, 1, 3, 10]))
    figure.legend(*axes[0].get_legend_handles_labels(), **plots.ABOVE)
    note_source(figure, f"{PART_SHOWN}; {SEED}")
    return figure


def bf16_still(runs: Runs) -> Figure:
    """Draw OPD's update of the block at a fifth of the training, in both views, and the two courses."""
    origin, update, _ = blocks(runs)["opd"]
    path, progress = runs.path("opd"), runs.progress("opd")
    sizes = [frobenius(so_far) / frobenius(path[-1]) for so_far in path]
    exact = [update * size for size in sizes]
    seen = [rounded(origin + some) - origin for some in exact]
    early = fifth(progress)
    figure, axes = plots.panels(4, columns=4, width=2.7)
    limit = 3 * frobenius(exact[early]) / BLOCK
    for axis, some, title in zip(axes, (exact, seen), ("in float32", "through bf16"), strict=False):
        axis.imshow(some[early], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(f"{title}, at {percent(progress[early])}")
        axis.set_axis_off()
    colour = COLOURS["opd"]
    for some, style, label in ((exact, "--", "in float32"), (seen, "o-", "through bf16")):
        bases = [top_right(svd(delta, k=K), K) for delta in some]
        axes[2].plot(progress, [stable_rank(delta) for delta in some], style, color=colour, ms=4, label=label)
        axes[3].plot(progress, [sim_k(basis, bases[-1]) for basis in bases], style, color=colour, ms=4)
    for axis, title in zip(axes[2:], ("stable rank", f"Sim to the end, K = {K}"), strict=True):
        axis.set_title(title)
        show_progress(axis)
    axes[2].set(yscale="log", ylim=(1, 32))
    axes[2].yaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16, 32]))
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].yaxis.set_minor_locator(NullLocator())
    axes[2].legend()
    axes[3].set_ylim(0, 1.05)
    note_source(figure, f"{PART_SHOWN}; OPD, {SEED}")
    return figure


def token_still(runs: Runs) -> Figure:
    """Draw the completions with OPD's credit of every token as its colour."""
    told = token_data(runs)
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(told["completions"]) + 0.9))
    for row, completion in enumerate(told["completions"]):
        for place, token in enumerate(completion["tokens"]):
            credit = token["teacher"] - token["student"]
            colour = (0.84, 0.24, 0.0) if credit < 0 else (0.0, 0.45, 0.7)
            face = (*colour, 0.55 * min(1.0, abs(credit) / 2))
            axis.add_patch(plt.Rectangle((place - 0.45, row - 0.4), 0.9, 0.8, fc=face, ec="0.6", lw=0.6))
            word, size = ("end", 8) if token["token"] == told["end"] else (token["token"], 11)
            axis.text(place, row, word, ha="center", va="center", family="DejaVu Sans Mono", fontsize=size)
        axis.text(len(completion["tokens"]), row, "right" if completion["reward"] else "wrong", va="center")
    longest = max(len(completion["tokens"]) for completion in told["completions"])
    axis.set(xlim=(-0.6, longest + 2.5), ylim=(len(told["completions"]) - 0.4, -0.6))
    axis.set_title(
        f"Prompt {told['prompt']}, right answer {told['answer']}. Credit under OPD: blue above zero, red below."
    )
    axis.set_axis_off()
    return figure


def subspace_still(runs: Runs) -> Figure:
    """Draw the similarity to the end of all arms in the three views, and OPD's squares at a fifth of the training."""
    data = subspace_data(runs)
    early = fifth(data["progress"])
    titles = {"float32": "in float32", "bf16": "through bf16", "locked": "locked null, through bf16"}
    figure, axes = plots.panels(6, columns=3)
    for upper, lower, (view, title) in zip(axes, axes[3:], titles.items(), strict=False):
        for arm in data["arms"]:
            marked = {"marker": arm["marker"], "ms": 4, "label": arm["label"]}
            upper.plot(data["progress"], arm[view]["sim"], **marked, **line(arm["name"]))
            if arm["name"] == "opd":
                squares = np.frombuffer(b64decode(arm[view]["squares"]), np.uint8).reshape(-1, K, K)[early]
                lower.imshow(squares, cmap="Oranges", vmin=0, vmax=255)
                lower.set(title=f"OPD at {percent(data['progress'][early])}: Sim = {arm[view]['sim'][early]:.2f}")
        upper.set(title=title, ylim=(0, 1.05))
        show_progress(upper)
        lower.set(xticks=[], yticks=[], xlabel="directions at the end")
    axes[0].set_ylabel(f"Sim to the end, K = {K}")
    axes[3].set_ylabel("directions now")
    figure.legend(*axes[0].get_legend_handles_labels(), **plots.ABOVE)
    note_source(figure, f"{WHOLE_SHOWN}; {SEED}")
    return figure


def ellipse_still(_: Runs) -> Figure:
    """Draw what an update across the first direction does to a matrix of two by two."""
    w0 = torch.tensor([[1.4, 0.3], [0.5, 0.8]], dtype=torch.float64)
    u, v = svd(w0).u[:, 0], svd(w0).vh[0]
    w1 = w0 + 0.7 * torch.outer(torch.stack([-u[1], u[0]]), v)
    turn = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    circle = torch.stack([turn.cos(), turn.sin()])
    figure, axes = plots.panels(2, columns=2)
    for axis, title in zip(axes, ("inputs: the unit circle", "outputs: where it goes"), strict=True):
        axis.set(title=title, aspect="equal", xlim=(-2.2, 2.2), ylim=(-2, 2))
        axis.set_axis_off()
    for weights, style, name in ((w0, "--", "before"), (w1, "-", "after the update")):
        found = svd(weights)
        axes[1].plot(*(weights @ circle), "k" + style, lw=1.2, label=name)
        for direction, size, colour in zip(range(2), found.s.tolist(), ("#D55E00", "#0072B2"), strict=True):
            v, u = found.vh[direction], size * found.u[:, direction]
            axes[0].plot(*torch.stack([-v, v]).T, style, color=colour)
            axes[1].plot(*torch.stack([-u, u]).T, style, color=colour)
    axes[0].plot(*circle, "k-", lw=1.2)
    axes[0].legend(*axes[1].get_legend_handles_labels(), loc="lower left")
    return figure


STILLS = {
    "size": size_still,
    "bf16": bf16_still,
    "token": token_still,
    "subspace": subspace_still,
    "ellipse": ellipse_still,
}


def main() -> None:
    """Write everything."""
    runs = recorded_runs()
    plots.use_style()
    for name in DATA:
        (OUT / f"{name}-data.js").write_text(script_of(name, runs))
    for name, draw in STILLS.items():
        figure, drawn = draw(runs), BytesIO()
        figure.savefig(drawn, format="png", dpi=1.5 * figure.dpi, metadata={"Software": None})
        plt.close(figure)
        (OUT / f"{name}.png").write_bytes(fewer_colours(drawn.getvalue()))


if __name__ == "__main__":
    main()

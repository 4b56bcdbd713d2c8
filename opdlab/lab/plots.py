"""The figures of the book: the functions of :mod:`opdlab.figures`, with a look for each arm of the grid.

Each of the paper's arms has a colour of its own, from Okabe and Ito's palette, which colour-blind readers tell apart,
and a marker of its own, which tells it apart in grey. A variant has those of the paper's arm that it descends from.
"""

from opdlab.figures.arms import ArmFigures, Look
from opdlab.figures.diagram import Diagram, Lane, draw_experiment

# What needs no arm is here too, so that a chapter draws all its figures by one name.
from opdlab.figures.ruler import draw_ruler  # noqa: F401
from opdlab.figures.style import ABOVE, NULL, panels, set_log, use_style  # noqa: F401
from opdlab.lab.grid import ARMS, ancestor

#: The colour of each of the paper's arms.
COLOURS = {"sft": "#0072B2", "opd": "#D55E00", "opd_full": "#CC79A7", "rlvr": "#009E73", "sft_matched": "#56B4E9",
           "random_signs": "#E69F00"}  # fmt: skip
#: The marker of each of the paper's arms.
MARKERS = {"sft": "s", "opd": "o", "opd_full": "D", "rlvr": "^", "sft_matched": "v", "random_signs": "P"}

# Arms that only make models descend from none of the paper's and are in no figure.
_FIGURES = ArmFigures(
    {
        name: Look(arm.label, COLOURS[ancestor(name)], MARKERS[ancestor(name)])
        for name, arm in ARMS.items()
        if ancestor(name) in COLOURS
    }
)
colour_of = _FIGURES.colour_of
marker_of = _FIGURES.marker_of
arm_legend = _FIGURES.arm_legend
draw_curves = _FIGURES.draw_curves
draw_dots = _FIGURES.draw_dots
draw_points = _FIGURES.draw_points
draw_rows = _FIGURES.draw_rows

# Who writes and who grades, of the arms that start from the anchor.
_LANES = {
    arm: Lane(ARMS[arm].label, COLOURS[arm], writes, grades)
    for arm, writes, grades in (
        ("opd", "student", "teacher, each token"),
        ("rlvr", "student", "a checker, once"),
        ("sft_matched", "teacher", "nobody, all imitated"),
        ("random_signs", "student", "a coin, each token"),
    )
}


def experiment(*active: str) -> Diagram:
    """Return the picture of the toy model's experiment, with some arms lit, or all."""
    return draw_experiment(
        "read careful and careless authors",
        "SFT: imitates the careless",
        "has the skill, and seldom shows it",
        _LANES,
        active,
    )

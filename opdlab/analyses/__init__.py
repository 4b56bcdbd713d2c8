"""Analyses of finished runs: what is computed from their weights without training any more.

:mod:`~opdlab.analyses.study` is what they work on; one module for each question follows it.
"""

from opdlab.analyses.directions import DIRECTIONS
from opdlab.analyses.gradients import GRADIENTS
from opdlab.analyses.landscape import EXTRAPOLATION, LANDSCAPE
from opdlab.analyses.similarity import SIMILARITY
from opdlab.analyses.span import SPAN
from opdlab.analyses.study import Analysis, Study

#: All analyses, by name.
#:
#: :meta hide-value:
ANALYSES = {analysis.name: analysis for analysis in (SIMILARITY, DIRECTIONS, SPAN, LANDSCAPE, EXTRAPOLATION, GRADIENTS)}

__all__ = ["ANALYSES", "Analysis", "Study"]

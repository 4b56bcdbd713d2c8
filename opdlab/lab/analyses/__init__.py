"""Analyses of finished runs: what is computed from their weights without training any more; a module a question."""

from opdlab.lab.analyses.gradients import GRADIENTS
from opdlab.lab.analyses.landscape import EXTRAPOLATION, LANDSCAPE
from opdlab.lab.analyses.linearity import LINEARITY
from opdlab.lab.analyses.retention import RETENTION
from opdlab.lab.analyses.runset import Analysis, Part, RunSet
from opdlab.lab.analyses.similarity import SIMILARITY
from opdlab.lab.analyses.span import SPAN
from opdlab.lab.analyses.taught import TAUGHT

#: All analyses, by name.
#:
#: :meta hide-value:
ANALYSES = {
    analysis.name: analysis
    for analysis in (SIMILARITY, SPAN, LANDSCAPE, EXTRAPOLATION, GRADIENTS, LINEARITY, RETENTION, TAUGHT)
}

"""opdlab: the parameter-space geometry of on-policy distillation, next to SFT and RLVR.

The rooms, each below the next: :mod:`opdlab.geometry` (tensors in, numbers out), :mod:`opdlab.models` (weights on
disk), :mod:`opdlab.training` (how models learn), :mod:`opdlab.figures`, :mod:`opdlab.measuring` (updates between
checkpoints), :mod:`opdlab.lab` (the book's own experiments) and :mod:`opdlab.claims` (what they say about the paper).
"""

import warnings

# transformers imports tqdm.auto, which warns in every notebook kernel without ipywidgets; our bars are plain text.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"

"""opdlab: the parameter-space geometry of on-policy distillation, next to SFT and RLVR.

Read it in this order: :mod:`opdlab.tasks`, :mod:`opdlab.objectives`, :mod:`opdlab.rollouts`, :mod:`opdlab.batches`,
:mod:`opdlab.signals`, :mod:`opdlab.constraints`, :mod:`opdlab.arms`, :mod:`opdlab.scales`, :mod:`opdlab.learner`,
:mod:`opdlab.training` for how models are trained; :mod:`opdlab.geometry` for how an update is measured;
:mod:`opdlab.runs`, :mod:`opdlab.analyses`, :mod:`opdlab.records`, :mod:`opdlab.reproduction` for how results are found,
kept and repeated;
:mod:`opdlab.claims` for what they say about the paper; :mod:`opdlab.fetch`, :mod:`opdlab.planning`,
:mod:`opdlab.engines`, :mod:`opdlab.beside` for real pretrained models;
:mod:`opdlab.engines` for training on many GPUs;
:mod:`opdlab.checkpoints`, :mod:`opdlab.instrument`, :mod:`opdlab.compare`, :mod:`opdlab.callback` for models that
were trained elsewhere.
"""

import warnings

# transformers imports tqdm.auto, which warns in every notebook kernel without ipywidgets; our bars are plain text.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"

"""Engines: training on many GPUs by programs that others wrote. There is one, TRL, under ``accelerate launch``.

``opdlab train --arm opd_full --scale paper --engine trl`` writes two files into a run folder, the arguments of a TRL
trainer (:mod:`~opdlab.engines.configuration`) and those of ``accelerate`` (FSDP2), prints the command and runs it: each
process is then :mod:`opdlab.engines.trl`. The weights at the steps of ``snapshots`` are put together from all GPUs by
:class:`opdlab.callback.GeometryCallback`, as files that ``opdlab measure BASE --trajectory RUN/snapshots`` reads.

What TRL can run, by who writes the sequences and what is learned from them:

============  ==============================================  =======================================================
arm           trainer                                         loss
============  ==============================================  =======================================================
sft           ``SFTTrainer``                                  cross-entropy of the completion
opd_full      ``DistillationTrainer``, beta = 1               KL(student || teacher) over the whole vocabulary
opd_forward   ``DistillationTrainer``, beta = 0               KL(teacher || student), likewise
opd           ``trl.experimental`` ``IWOPDTrainer``, gamma 0  the paper's: a policy gradient on the sampled token
rlvr          ``GRPOTrainer``                                 GRPO, averaged over tokens ("dapo"), no KL, 0.2 and 0.28
============  ==============================================  =======================================================

``DistillationTrainer`` itself has no estimator from the sampled token: it always compares whole distributions, on
completions of the student, one for each row of the data set. Matched SFT is left out, as no trainer samples from the
teacher; so are the variants that choose tokens, mix objectives, or confine or round the weights.

Where the two engines agree and where they do not. Step t sees the same prompts in the same order, the loss is averaged
over the same tokens, and rate, clipping and AdamW are the same: from the same sequences comes the same update
(``tests/test_engines.py``). But TRL

- samples from random streams of its own, so the completions are others;
- spares norms from weight decay;
- has the paper's epsilon of Adam for RLVR, 1e-15, where opdlab's loop has 1e-8: some per cent of a first step;
- makes an update from momentum where all rewards of a batch are alike, which opdlab's loop skips;
- in bf16 under FSDP2 adds up the gradients of different GPUs in bf16, and only those of micro-batches in float32;
- keeps the whole teacher on each GPU: 64 GB for 32 billion weights in bf16;
- starts anew when it was stopped, and measures no accuracy.

The tests run on CPUs in float32. On GPUs, in bf16 and with vLLM this has not been run yet.
"""

"""What other papers found about the claims of the laboratory in the regime, as far as they measured it.

Every sentence begins with whether it agrees with the claim or contradicts it. The numbers are those that the papers
print, of other models and lengths than this laboratory's, and of other definitions: to 2606.13657 a weight that moves
by less than 1e-5 is unchanged, to 2606.07082 one whose bfloat16 number stays.
"""

#: What other papers found, by the name of the claim; a claim that none bears on is left out.
#:
#: :meta hide-value:
ELSEWHERE = {
    # --- where the updates land ---
    "sparsity-opd-sft": "agrees: OPD leaves 67 to 90 % of the weights unchanged in six pairs of 1B to 4B models, "
    "offline distillation of Qwen2.5-Math-1.5B 3 % (2606.13657)",
    "sparsity-rlvr-opd": "contradicts: OPD changes 1.3 % of SmolLM3-3B and RL 21 % (2609.39405), "
    "17 and 22 % of DS-Qwen-1.5B (2606.13657)",
    "principal-opd": "agrees: 4.4 to 5.5 % of what six OPD updates changed is in the principal tenth of the weights "
    "(2606.13657, 1B to 4B)",
    "low-opd": "agrees: 23 to 49 % of what six OPD updates changed is in the smallest tenth of the weights "
    "(2606.13657, 1B to 4B)",
    "principal-rlvr": "agrees: 5.3 % of what RLVR changed in DeepScaleR-1.5B is in the principal tenth of the weights, "
    "8.3 % in JustRL-1.5B (2606.13657)",
    "low-rlvr": "agrees: 31 % of what RLVR changed in DeepScaleR-1.5B is in the smallest tenth of the weights "
    "(2606.13657)",
    "sparsity-same-teacher": "contradicts: two teachers of the student's own size leave 83 and 70 % of DS-Qwen-1.5B "
    "unchanged (2606.13657)",
    "density-rlvr-long": "contradicts: RLVR with 3.4 times OPD's steps changes 28 % of Qwen3-8B's weights, OPD 46 % "
    "(2606.07082)",
    "sparsity-rlvr-teacher": "contradicts: after 200 steps of OPD the size of the update, 0.025 to 0.098 %, "
    "does not tell such teachers from larger ones (2610.11247)",
    # --- stable rank and size ---
    "rank-rlvr-falls": "contradicts: RLVR moves the weights along straight lines (R^2 about 0.9), on which the rank "
    "stays (2601.04537, 1.5B to 8B)",
    "rank-sft-rises": "agrees in the end: offline distillation of Qwen2.5-Math-1.5B arrives at 83 (2606.13657)",
    "rank-opd-flat": "agrees in the end: OPD arrives at 7 to 20, offline distillation at 83 (2606.13657, 1B to 4B)",
    "rank-opd-low": "agrees in the end: OPD arrives at 10.0, RLVR at 16.1 (2606.13657, DS-Qwen-1.5B); contradicts: "
    "RL is more concentrated than OPD at all ranks (2609.39405, SmolLM3-3B)",
    "rank-opd-rlvr-end": "contradicts: RLVR arrives at 16.1, OPD at 10.0 (2606.13657, DS-Qwen-1.5B), and the first "
    "singular value is 0.33 of RL's norm, 0.37 of OPD's (2605.11739, 8B)",
    "norm-opd-rlvr": "contradicts: OPD moves 60 to 69 % as far as RL (2609.39405, SmolLM3-3B), "
    "64 % as far in DS-Qwen-1.5B (2606.13657)",
    # --- locking ---
    "locking-opd": "agrees: a tenth of OPD's training, stretched to the final size, has about 80 % of the score "
    "(2605.11739, 1.5B to 14B)",
    "locking-opd-rlvr": "agrees: OPD's first 20 directions are nearer to the final ones than RL's, most of all in the "
    "first 30 % of the training (2605.11739, 1.5B to 14B)",
    "locking-rlvr": "agrees: RLVR moves the weights along straight lines, R^2 about 0.9 (2601.04537, 1.5B to 8B); "
    "contradicts: RL's first 20 directions settle late (2605.11739)",
    "linear-rlvr": "agrees: RLVR moves the weights along straight lines, R^2 about 0.9 (2601.04537, 1.5B to 8B)",
    "linear-early": "contradicts: RL's first 20 directions settle late (2605.11739, 1.5B to 14B)",
    "concentrated-opd": "agrees: OPD arrives at a stable rank of 10.0, RLVR at 16.1 (2606.13657, DS-Qwen-1.5B); "
    "contradicts: RL is more concentrated than OPD at all ranks (2609.39405, SmolLM3-3B)",
    # --- is OPD between the others, or what its teacher is? ---
    "taught-norm": "contradicts, from a larger teacher: OPD's update is substantially larger than RLVR's "
    "(2606.07082, Qwen3-8B)",
    "taught-energy": "contradicts: the first singular value is 0.33 of RL's norm, 0.37 of that of OPD, whose teacher "
    "RL made too (2605.11739, 8B)",
    # --- is the early subspace enough? ---
    "sufficiency-opd": "agrees, for entries: OPD of the 17.5 % that OPD moves solves 35.1 %, of all 35.5 % "
    "(2606.13657, DS-Qwen-1.5B)",
    "sufficiency-strict": "agrees, afterwards: a tenth of the rank of OPD's update keeps 95 % of the score "
    "(2605.11739, 1.5B to 14B)",
    "sufficiency-own": "agrees, for entries: OPD's own solve 35.1 %, RLVR's 34.7 %, random ones 32.9 % "
    "(2606.13657, DS-Qwen-1.5B)",
    "sufficiency-sft": "contradicts, for entries: SFT of the 5 % principal weights does better than of all "
    "(2506.00772)",
    # --- tokens ---
    "tokens-first": "agrees: OPD of prefixes does as well as of whole completions, at 2 to 47 times less compute "
    "(2602.15260, Qwen3-1.7B and 8B)",
    "tokens-last": "agrees: the signal of OPD is concentrated in the prefixes (2602.15260, Qwen3-1.7B and 8B)",
    "tokens-random": "contradicts, at one token a completion: a random one reaches 15.6 %, that of the lowest credit "
    "29.0 %, all of them 27.5 % (2609.04565, Qwen3-1.7B)",
    # --- writers ---
    "norm-opd_teacher100": "contradicts: the learning rate, not the writer, decides how many weights change "
    "(2609.35259, students up to 1.5B)",
    "rollouts-stale": "agrees: reverse KL does better on the student's own rollouts (2609.35259, up to 1.5B); "
    "contradicts: rollouts of the initial student do better in 14 of 17 pairs (2610.11291, 1.5B to 235B)",
    "rollouts-stale-forward": "agrees: forward KL does as well whoever writes (2609.35259, students up to 1.5B)",
    # --- objectives ---
    "rank-opd_mix50": "agrees: of the tenth of the weights that OPD moves most, a mixture moves 7.7 % the other way, "
    "RLVR 20.4 % (2609.04108, Qwen3-1.7B)",
    # --- mechanism ---
    "rank-opd_same_teacher": "contradicts: two teachers of the student's own size give OPD stable ranks of 10.0 and "
    "7.3 (2606.13657, DS-Qwen-1.5B)",
    "rank-opd_rlvr_teacher": "contradicts: two teachers that RLVR made of the student give OPD stable ranks of 10.0 "
    "and 7.3 (2606.13657, DS-Qwen-1.5B)",
    "rank-opd_forward": "agrees, for sparsity: the learning rate, not the direction of the KL, decides how many "
    "weights change (2609.35259, students up to 1.5B)",
    "rank-credit": "contradicts, for scores: one negative credit for the fifth of the tokens with the lowest "
    "probability has much of OPD's gain (2608.31046, Qwen3-1.7B)",
    "rank-bf16": "agrees, for sparsity: in float32 RL's mostly vanishes (2509.04259, as 2511.08567 cites it)",
    "rank-rate": "agrees, for sparsity: at a higher learning rate RLVR's largely disappears (2511.08567)",
}

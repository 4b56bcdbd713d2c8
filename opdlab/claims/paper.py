"""The claims that the laboratory in the regime tests: those of the paper (2606.07082), then those of newer papers.

They are committed before the runs that they judge, or before the analyses of these, and each record names the claims
that it was made under by their digests. Margins are the same for all claims of a kind: a factor of 1.2 for sizes and
ranks, a twentieth of what is possible for sparsity, masks and similarities, and 0.02 nats of KL to the teacher, about a
tenth of what OPD gains.

A source without the number of a paper is a place in the third version of 2606.07082, or in the draft of its first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Any

from opdlab.claims.literature import ELSEWHERE
from opdlab.claims.rules import Claim, Contrast, Metric

#: The margins of ratios, of shares, and of the KL to the teacher in nats per token.
RATIO, SHARE, NATS = log(1.2), 0.05, 0.02
_RECIPE, _SIZE, _LOCKED = "SFT's own recipe", "the size of the update", "rounding, on an update that is locked"
_NOISE, _MATCHED, _SIGNS = "noise of the same density", "matched SFT", "random signs"

# --- what is measured: sizes and places ---

_SPARSITY, _BEYOND_SIZE = Metric("sparsity"), Metric("sparsity", minus="sparsity_ruler")
_ANGLE, _ANGLE_MATCHED, _DRIFT, _DRIFT_MATCHED = (
    Metric(column, log=True) for column in ("angle_left_mean", "angle_left_mean_matched", "nss", "nss_matched")
)
_NULLS, _PRINCIPAL, _LOW = ("share", "ruler", "noise"), "principal_position_a30", "low_position_a30"
_AVOIDS, _AVOIDS_SIZE, _AVOIDS_NOISE = (Metric(f"{_PRINCIPAL}_{null}", minus=_PRINCIPAL) for null in _NULLS)
_PREFERS, _PREFERS_SIZE, _PREFERS_NOISE = (Metric(_LOW, minus=f"{_LOW}_{null}") for null in _NULLS)

# --- trajectories: the paper follows attention between checkpoints in bfloat16, from a fifth of the training on ---

_FOLLOWED: dict[str, Any] = {"block": "attention", "log": True}
_CURVE = Metric("stable_rank_bf16", curve=True, **_FOLLOWED)
_NORM = Metric("frobenius", progress=1.0, **_FOLLOWED)
_END, _EARLY = (Metric("stable_rank_bf16", progress=progress, **_FOLLOWED) for progress in (1.0, 0.2))
_RISE, _FALL = replace(_END, since=0.2), replace(_EARLY, since=1.0)
_FLOAT_END, _FLOAT_RISE = (Metric("stable_rank", progress=1.0, since=since, **_FOLLOWED) for since in (None, 0.2))
_SIM, _FLOAT_SIM = (Metric(f"sim_right_K16{of}", progress=0.2, block="attention") for of in ("_bf16", ""))
_WALK = replace(_FLOAT_SIM, minus="sim_right_K16_null")

# --- what was learned: of the KL to the teacher less is better, so the better arm is the second ---

_KL = Metric("kl_teacher")

# --- analyses of finished runs; paths are compared with a random walk whose intervals have the same norms ---

_LINE, _MULTIPLES, _AHEAD_EARLY = (
    Metric(column, f"{column}_null", "linearity", block="all") for column in ("r2", "along", "cosine")
)
_AHEAD = Metric("cosine_rank1", analysis="linearity", block="all")
_FIRST = Metric("first", analysis="linearity", block="all", log=True)
_TENTH = (("kind", "stretched"), ("progress", 0.1), ("factor", 1.0))
_STRETCHED = Metric("recovered_kl", analysis="extrapolation", where=_TENTH)
_TO_NEXT, _TO_SAME = (
    Metric("sim_right_K16", analysis="similarity", where=(("other", "opd"), ("next_seed", later)), block="attention")
    for later in (True, False)
)
_SPAN, _SPAN_MATCHED = (
    Metric("outside", analysis="span", where=(("basis", basis),)) for basis in ("SFT and RLVR", "matched SFT and RLVR")
)
_TAUGHT_NORM = Metric("norm", analysis="taught", block="all", log=True)
_OFF, _ENERGY = (Metric(column, analysis="taught", block="all") for column in ("outside", "energy_4"))
_SHARED = Metric("sim_right_K16", analysis="gradients", block="attention")
_FORGOTTEN = Metric("kl", analysis="retention", log=True)


def _locked(metric: Metric) -> Metric:
    """Return what a metric between bfloat16 checkpoints has beyond that of the locked null."""
    return replace(metric, minus=metric.column.replace("_bf16", "_locked"))


def _claim(name: str, finding: str, statement: str, source: str, metric: Metric, arms: str, margin: float,
           kind: str = "above", *, controls: Mapping[str, str | Metric | Contrast] = {},
           rivals: Mapping[str, str | Metric | Contrast] = {}, known: str = "words") -> Claim:  # fmt: skip
    """Return a claim on "one arm" or "one - another"; a control or a rival names other arms, or another metric."""

    def other(part: str | Metric | Contrast) -> Contrast:
        if isinstance(part, str):
            return Contrast(metric, *part.split(" - "))
        return replace(effect, metric=part) if isinstance(part, Metric) else part

    effect = other(arms)
    left, same = ({label: other(part) for label, part in parts.items()} for parts in (controls, rivals))
    return Claim(name, finding, statement, source, effect, margin, kind, left, same, known, ELSEWHERE.get(name, ""))


def _same_rank(arm: str, finding: str, what: str, source: str, to: str = "opd") -> Claim:
    return _claim(f"rank-{arm}", finding, f"{what} keeps OPD's stable rank", source, _CURVE, f"{arm} - {to}", RATIO,
                  "near", rivals={"RLVR": f"rlvr - {to}", _SIGNS: f"random_signs - {to}"})  # fmt: skip


#: All claims.
#:
#: :meta hide-value:
CLAIMS = (
    # --- where the updates land ---
    _claim("sparsity-opd-sft", "regime", "OPD leaves more weights unchanged than SFT",
           "Table 1: 8.1, 51.6 and 77.2 %", _SPARSITY, "opd - sft", SHARE,
           controls={_SIZE: _BEYOND_SIZE, _RECIPE: "opd - sft_matched"}, known="printed"),
    _claim("sparsity-rlvr-opd", "regime", "RLVR leaves more weights unchanged than OPD",
           "Table 1: 8.1, 51.6 and 77.2 %", _SPARSITY, "rlvr - opd", SHARE,
           controls={_SIZE: _BEYOND_SIZE}, known="printed"),
    _claim("rotation-sft-opd", "regime", "SFT turns subspaces further than OPD",
           "Section 3.2: above 10 and around 1 degree in one layer", _ANGLE, "sft - opd", RATIO,
           controls={_SIZE: _ANGLE_MATCHED, _RECIPE: "sft_matched - opd"}, known="printed"),
    _claim("rotation-opd-rlvr", "regime", "OPD turns subspaces further than RLVR",
           "Section 3.2: around 1 and below 0.5 degrees in one layer", _ANGLE, "opd - rlvr", RATIO,
           controls={_SIZE: _ANGLE_MATCHED}, known="printed"),
    _claim("drift-sft-opd", "regime", "SFT moves the spectrum further than OPD",
           "Section 3.2: at the 1e-3 and the 1e-4 level", _DRIFT, "sft - opd", RATIO,
           controls={_SIZE: _DRIFT_MATCHED, _RECIPE: "sft_matched - opd"}, known="printed"),
    _claim("drift-opd-rlvr", "regime", "OPD moves the spectrum further than RLVR",
           "Section 3.2: at the 1e-4 and the 1e-5 level", _DRIFT, "opd - rlvr", RATIO,
           controls={_SIZE: _DRIFT_MATCHED}, known="printed"),
    _claim("principal-opd", "regime", "OPD avoids the principal weights",
           "Section 3.2: below the 30 % random baseline", _AVOIDS, "opd", SHARE,
           controls={_SIZE: _AVOIDS_SIZE, _NOISE: _AVOIDS_NOISE}),
    _claim("low-opd", "regime", "OPD prefers the small weights",
           "Section 3.2: 53.59 % of OPD's updates and 73.48 % of RLVR's, at random 30", _PREFERS, "opd", SHARE,
           controls={_SIZE: _PREFERS_SIZE, _NOISE: _PREFERS_NOISE}, known="printed"),
    _claim("principal-rlvr", "regime", "RLVR avoids the principal weights",
           "Section 3.2: below the 30 % random baseline", _AVOIDS, "rlvr", SHARE,
           controls={_SIZE: _AVOIDS_SIZE, _NOISE: _AVOIDS_NOISE}),
    _claim("low-rlvr", "regime", "RLVR prefers the small weights",
           "Section 3.2: 53.59 % of OPD's updates and 73.48 % of RLVR's, at random 30", _PREFERS, "rlvr", SHARE,
           controls={_SIZE: _PREFERS_SIZE, _NOISE: _PREFERS_NOISE}, known="printed"),
    _claim("sparsity-same-teacher", "regime", "OPD from a teacher of its own size leaves as many weights unchanged",
           "Table 1: 48.6 to 57.1 % for all variants, of which none has such a teacher",
           _SPARSITY, "opd_same_teacher - opd", SHARE, "near", rivals={_MATCHED: "sft_matched - opd"}, known="printed"),
    _claim("density-rlvr-long", "regime", "Ten times as long as OPD, RLVR changes more weights than OPD",
           "2609.39405, Appendix C.1: 1.27 % changed by OPD, 21.04 % by RL, from one anchor at one rate",
           _SPARSITY, "opd - rlvr_10", SHARE, controls={_SIZE: _BEYOND_SIZE}, known="printed"),
    _claim("sparsity-rlvr-teacher", "regime", "Taught by what RLVR made of its anchor, OPD changes fewer weights",
           "2609.39405, Appendix C.1: with such a teacher OPD changes 1.27 %",
           _SPARSITY, "opd_rlvr_teacher - opd", SHARE, known="printed"),
    # --- stable rank and size ---
    _claim("rank-rlvr-falls", "rank", "The stable rank of RLVR falls",
           "Section 4.1: contracts toward a low-dimensional endpoint", _FALL, "rlvr", RATIO,
           controls={_LOCKED: _locked(_FALL)}),
    _claim("rank-sft-rises", "rank", "The stable rank of SFT rises",
           "Section 4.1: progressively expands; from 20 to 75, as a reader took it from Figure 4",
           _RISE, "sft", RATIO, controls={_RECIPE: "sft - sft_matched"}, known="secondary"),
    _claim("rank-opd-flat", "rank", "The stable rank of OPD rises less than that of SFT",
           "Section 4.1: a narrow low-rank band; 20 to 30, as a reader took it from Figure 4",
           _RISE, "sft - opd", RATIO,
           controls={_RECIPE: "sft_matched - opd", _LOCKED: _locked(_RISE)}, known="secondary"),
    _claim("rank-opd-level", "rank", "From a fifth of the training to the end OPD's stable rank hardly changes",
           "Section 4.1: a narrow low-rank band; 20 to 30, as a reader took it from Figure 4",
           _RISE, "opd", RATIO, "near", rivals={_MATCHED: "sft_matched"}, known="secondary"),
    _claim("rank-opd-low", "rank", "At a fifth of the training OPD's stable rank is below RLVR's",
           "Section 4.1: OPD enters the low-dimensional regime early, RLVR contracts toward it",
           _EARLY, "rlvr - opd", RATIO, controls={_LOCKED: _locked(_EARLY)}),
    _claim("rank-opd-rlvr-end", "rank", "In the end RLVR's stable rank is about OPD's",
           "Section 4.1: ending with comparable stable rank", _END, "rlvr - opd", RATIO, "near",
           rivals={_MATCHED: "sft_matched - opd", _SIGNS: "random_signs - opd"}),
    _claim("norm-opd-rlvr", "rank", "OPD moves further than RLVR",
           "Section 4.1: a substantially larger update; norms of 0.452 and 0.168 in the draft",
           _NORM, "opd - rlvr", RATIO, known="draft"),
    _claim("norm-signs", "rank", "OPD moves further than credits without meaning would take it",
           "2606.07082 has no such control", _NORM, "opd - random_signs", RATIO,
           controls={"matched SFT, which moves as far": "opd - sft_matched"}),
    # --- locking ---
    _claim("locking-opd", "locking", "OPD's final subspace is there at a fifth of the training",
           "Section 4.2: aligns with its final V16 from the first measured checkpoint", _WALK, "opd", SHARE,
           rivals={_MATCHED: "sft_matched", _SIGNS: "random_signs"}),
    _claim("locking-opd-rlvr", "locking", "OPD's final subspace is there earlier than RLVR's",
           "Section 4.2: SFT and RLVR converge more gradually", _SIM, "opd - rlvr", SHARE,
           controls={_LOCKED: _locked(_SIM)}),
    _claim("locking-opd-sft", "locking", "OPD's final subspace is there earlier than SFT's",
           "Section 4.2: SFT and RLVR converge more gradually", _SIM, "opd - sft", SHARE,
           controls={_RECIPE: "opd - sft_matched", _LOCKED: _locked(_SIM)}),
    _claim("locking-rlvr", "locking", "RLVR's final subspace is there at a fifth of the training, too",
           "2605.21468: one direction, estimated from the first 15 % of the steps, does as well as all of RLVR",
           _WALK, "rlvr", SHARE, rivals={_SIGNS: "random_signs"}),
    # --- is the early subspace enough? ---
    _claim("sufficiency-opd", "sufficiency", "OPD with gradients in its early 16 directions loses nothing",
           "Section 4.2: essentially unchanged; 64.2 against 63.3 % in the draft",
           _KL, "opd - opd_gradient16", -NATS, known="draft"),
    _claim("sufficiency-strict", "sufficiency", "OPD with updates in its early 4 directions loses nothing",
           "Section 4.2: sufficient for OPD training; made strict here", _KL, "opd - opd_update4", -NATS,
           rivals={"4 random directions": "opd - opd_random_rescaled4",
                   "4 principal directions of W0": "opd - opd_weights4",
                   "4 directions of RLVR": "opd - opd_of_rlvr4"}),
    _claim("sufficiency-own", "sufficiency", "OPD's early directions serve it better than random ones of full size",
           "Section 4.2: not a generic property of the projection dimension",
           _KL, "opd_random_rescaled4 - opd_update4", NATS,
           controls={"the principal directions of W0": "opd_weights4 - opd_update4",
                     "RLVR's directions": "opd_of_rlvr4 - opd_update4",
                     "another seed's directions": "opd_of_seed4 - opd_update4"}),
    _claim("sufficiency-sft", "sufficiency", "SFT with gradients in its early 16 directions loses",
           "Section 4.2: degrades SFT; 45.6 against 55.5 % in the draft", _KL, "sft_gradient16 - sft", NATS,
           controls={_RECIPE: "sft_matched_update4 - sft_matched"}, known="draft"),
    # --- one part of OPD changed at a time ---
    _same_rank("opd_top25", "tokens", "The quarter of the tokens with the largest log-ratio",
               "Section 5.1: all sparsified variants closely track the trajectory"),
    _same_rank("opd_random25", "tokens", "A random quarter of the tokens",
               "Section 5.1: changes update scale more than spectral shape"),
    _claim("tokens-first", "tokens", "The first 30 % of the tokens do as well as all",
           "2606.22600, abstract: perform comparably to using all tokens", _KL, "opd - opd_first30", -NATS,
           rivals={"the last 30 %": "opd - opd_last30"}),
    _claim("tokens-last", "tokens", "The last 30 % of the tokens do worse than the first",
           "2606.22600, abstract: barely learns anything", _KL, "opd_last30 - opd_first30", NATS),
    _claim("tokens-random", "tokens", "A random quarter of the tokens does as well as all",
           "2604.14084, Table 3, where half of them, drawn by entropy, match all", _KL, "opd - opd_random25", -NATS),
    _same_rank("opd_teacher100", "rollouts", "Learning from the teacher's rollouts",
               "Section 5.1: leaves the trajectory nearly unchanged"),
    _claim("norm-opd_teacher100", "rollouts", "The teacher's rollouts move OPD further",
           "Section 5.1: a modestly larger update norm", _NORM, "opd_teacher100 - opd", log(1.05)),
    _claim("rollouts-stale", "rollouts", "With stale rollouts, reverse KL does worse",
           "2606.24143, abstract: student-weighted reverse KL is vulnerable", _KL, "opd_stale - opd", NATS),
    _claim("rollouts-stale-forward", "rollouts", "With stale rollouts, forward KL does not",
           "2606.24143, abstract: teacher-weighted forward KL is more robust",
           _KL, "opd_forward - opd_stale_forward", -NATS, rivals={"reverse KL": "opd - opd_stale"}),
    _same_rank("opd_mix50", "objectives", "Half of RLVR's objective",
               "Section 5.2: OPD-dominant mixtures retain the trajectory; no threshold is given"),
    _same_rank("opd_mix5", "objectives", "With one part in twenty of OPD, the mixture",
               "Section 5.2: departs when the OPD component becomes weak; no threshold is given"),
    _claim("rank-opd_mix1", "objectives", "With one part in a hundred of OPD, the stable rank is another",
           "Section 5.2: enters a distinct spectral regime", _CURVE, "opd_mix1 - opd", RATIO, "apart"),
    _same_rank("opd_same_teacher", "mechanism", "A teacher of the student's size",
               "2606.07082 varies the teacher in Table 1, for sparsity alone"),
    _same_rank("opd_rlvr_teacher", "mechanism", "A teacher that RLVR made of the anchor",
               "2609.39405 has such a teacher, and measures no stable rank"),
    _same_rank("opd_forward", "mechanism", "Forward KL",
               "Appendix D: with forward KL the argument is unchanged", to="opd_full"),
    _claim("rank-credit", "mechanism", "One credit per completion changes the stable rank",
           "Section 3.3, Gate II: heterogeneous token coefficients broaden the directional support",
           _CURVE, "opd_sequence_mean - opd", RATIO, "apart"),
    _claim("rank-bf16", "mechanism", "Weights stored in bf16 change the stable rank",
           "2606.07082, Table 2: bf16 training", _CURVE, "opd_bf16 - opd", RATIO, "apart"),
    _claim("rank-rate", "mechanism", "Four times the learning rate changes the stable rank",
           "2606.07082, Tables 4 and 5: one rate", _CURVE, "opd_quadruple_rate - opd", RATIO, "apart"),
    # --- learning against eliciting: the same arms from an anchor that has half learned the skill ---
    _claim("elicit-coherent", "mechanism", "Where the skill is elicited, OPD moves further than where it is learned",
           "A question of this book; 2606.07082 has one anchor", _NORM, "opd - young_opd", RATIO,
           rivals={_MATCHED: "sft_matched - young_sft_matched"}),
    _claim("elicit-low", "mechanism", "Where the skill is elicited, OPD's stable rank is lower in the end",
           "A question of this book; 2606.07082 has one anchor", _FLOAT_END, "young_opd - opd", RATIO,
           rivals={_MATCHED: "young_sft_matched - sft_matched"}),
    _claim("elicit-flat", "mechanism", "Where the skill is elicited, OPD's stable rank rises less",
           "A question of this book; 2606.07082 has one anchor", _FLOAT_RISE, "young_opd - opd", RATIO,
           rivals={_MATCHED: "young_sft_matched - sft_matched"}),
    _claim("elicit-early", "mechanism", "Where the skill is elicited, OPD's final subspace is there earlier",
           "A question of this book; 2606.07082 has one anchor", _FLOAT_SIM, "opd - young_opd", SHARE,
           rivals={_MATCHED: "sft_matched - young_sft_matched"}),
    # --- analyses: paths and directions ---
    _claim("linear-rlvr", "locking", "RLVR's update grows along a straight line in steps",
           "2605.21468, abstract: the magnitude of this projection evolves near-linearly with training steps",
           _LINE, "rlvr", SHARE, rivals={"OPD": "opd", _SIGNS: "random_signs"}),
    _claim("linear-rank", "locking", "RLVR's updates at all times are nearly multiples of one",
           "2605.21468, abstract: the majority of gains are captured by a rank-1 approximation of the parameter deltas",
           _MULTIPLES, "rlvr", SHARE, rivals={"OPD": "opd", _SIGNS: "random_signs"}),
    _claim("linear-early", "locking", "15 % of RLVR's training point to its end",
           "2605.21468, abstract: requiring as few as 15 % steps of full RLVR training",
           _AHEAD_EARLY, "rlvr", SHARE, rivals={"OPD": "opd", _SIGNS: "random_signs"}),
    _claim("ahead-opd", "locking", "OPD's leading directions point to their end earlier than RLVR's",
           "2605.11739: nearer to the final directions, most of all in the first 30 %", _AHEAD, "opd - rlvr", SHARE,
           controls={"matched SFT, whose own do so, too": "opd - sft_matched"}),
    _claim("concentrated-opd", "locking", "OPD's update has more of its energy in its first directions than RLVR's",
           "2605.11739: largest value over norm 39.6 and 33.2 % (1.5B) to 28.1 and 24.4 % (14B)",
           _FIRST, "opd - rlvr", RATIO,
           controls={"matched SFT, which has as much there": "opd - sft_matched"}, known="printed"),
    _claim("stretched", "locking", "A tenth of OPD's training, stretched to the final size, has most of its gain",
           "2605.11739: about 80 % of the score", _STRETCHED, "opd", 0.5,
           rivals={_MATCHED: "sft_matched", "RLVR": "rlvr"}, known="printed"),
    _claim("channel-own", "locking",
           "OPD's runs from two anchors share more of their final subspaces than OPD and RLVR",
           "2606.07082: a persistent channel of OPD's; no two runs are compared", _TO_NEXT, "opd - rlvr", SHARE,
           controls={"matched SFT, which shares as much": "opd - sft_matched"}),
    _claim("channel-objective", "locking", "Two estimators of OPD end nearer to one another than RLVR to OPD",
           "2606.07082: a persistent channel of OPD's; here from one anchor", _TO_SAME, "opd_full - rlvr", SHARE,
           controls={"matched SFT, which ends as near": "opd_full - sft_matched"}),
    # --- analyses: is OPD between the others, or what its teacher is? ---
    _claim("span", "interpolation", "Some of OPD's update lies outside the span of SFT's and RLVR's",
           "2606.07082, abstract: not merely an intermediate point between SFT and RLVR", _SPAN, "opd", SHARE,
           controls={"the noise of OPD's estimator": replace(_SPAN, minus="outside_own")}),
    _claim("span-matched", "interpolation", "Some of OPD's update lies outside the span of matched SFT's and RLVR's",
           "2606.07082, abstract: the same; here from OPD's anchor, by OPD's recipe", _SPAN_MATCHED, "opd", SHARE,
           controls={"the noise of OPD's estimator": replace(_SPAN_MATCHED, minus="outside_own")}),
    _claim("taught-norm", "interpolation", "Taught by what RLVR made of its anchor, OPD moves less far than RLVR",
           "2609.39405: 60 to 69 % of RL's norm", _TAUGHT_NORM, "rlvr - opd_rlvr_teacher", RATIO,
           rivals={"OPD from a larger teacher": "rlvr - opd"}, known="printed"),
    _claim("taught-own", "interpolation", "Most of OPD's update is orthogonal to that of its RL teacher",
           "2609.39405: 93 to 95 %", replace(_OFF, minus="inside"), "opd_rlvr_teacher", SHARE,
           controls={"another run of RLVR, which is as orthogonal": Contrast(_OFF, "opd_rlvr_teacher", "rlvr")},
           known="printed"),
    _claim("taught-energy", "interpolation", "Taught by what RLVR made of its anchor, OPD spreads its energy more",
           "2609.39405: less concentrated than RL's at all ranks", _ENERGY, "rlvr - opd_rlvr_teacher", SHARE,
           rivals={"OPD from a larger teacher": "rlvr - opd"}),
    # --- analyses: gradients, and what is forgotten ---
    _claim("gradients-top", "mechanism", "The top quarter of the tokens has gradients in OPD's subspace",
           "2606.07082: where the gradients of tokens share a dominant subspace",
           _SHARED, "opd_top25 - opd, another batch", -SHARE,
           rivals={"RLVR": "rlvr - opd, another batch", _SIGNS: "random signs - opd, another batch"}),
    _claim("gradients-rlvr", "mechanism", "RLVR's gradients lie in another subspace than OPD's",
           "2606.07082: another source of covariance", _SHARED, "opd, another batch - rlvr", SHARE,
           controls={"credits without meaning, whose gradients do so, too": "random signs - rlvr"}),
    _claim("forget-sft", "mechanism", "OPD forgets less than SFT",
           "2509.04259: who learns from their own samples forgets less", _FORGOTTEN, "sft - opd", RATIO,
           controls={_SIZE: replace(_FORGOTTEN, minus="kl_noise"), _RECIPE: "sft_matched - opd"}),
    _claim("forget-rlvr", "mechanism", "RLVR forgets less than matched SFT",
           "2509.04259: who learns from their own samples forgets less", _FORGOTTEN, "sft_matched - rlvr", RATIO,
           controls={_SIZE: replace(_FORGOTTEN, minus="kl_noise")}),
)  # fmt: skip
#: The findings that claims belong to, with title and page of the chapter on each, in the order of the book.
#:
#: :meta hide-value:
FINDINGS = {
    "regime": ("How far each update goes", "04_size"),
    "rank": ("Rank, and its shadow in bfloat16", "06_rank"),
    "locking": ("Locking", "07_locking"),
    "sufficiency": ("Is the early subspace enough?", "08_sufficiency"),
    "tokens": ("Change one part", "09_parts"),
    "rollouts": ("Change one part", "09_parts"),
    "objectives": ("Change one part", "09_parts"),
    "mechanism": ("What makes the geometry?", "10_mechanism"),
    "interpolation": ("Is OPD between SFT and RLVR?", "11_between"),
}

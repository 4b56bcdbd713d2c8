"""Building the lab from nothing, and comparing what comes out with the record.

The jobs of a scale are its three models and its recorded runs. They run as one-thread processes side by side, in the
order in which they need each other: base -> SFT -> anchor, teacher, and then everything that starts from the anchor.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import pandas as pd
from tqdm import tqdm

from opdlab.arms import ARMS, RECORDED, get_arm
from opdlab.errors import OpdlabError
from opdlab.processes import CONTEXT, workers
from opdlab.records import find_tables, read_record, write_record
from opdlab.runs import Home
from opdlab.scales import SCALES, Scale
from opdlab.stats import prediction_interval
from opdlab.training import install_model, train


@dataclass(frozen=True)
class Job:
    """One run, the model folders that it waits for, and the one that it makes (or "")."""

    arm: str
    seed: int
    needs: tuple[str, ...]
    makes: str = ""


def plan(scale: Scale, home: Home, arms: tuple[str, ...], seeds: tuple[int, ...]) -> list[Job]:
    """List the jobs that give the records of ``arms`` and ``seeds``, and before them the models that are missing.

    Raises:
        OpdlabError: if an arm is unknown, or one that no record is kept of.
    """
    for arm in arms:
        if get_arm(arm).name not in RECORDED:
            raise OpdlabError(f"no record is kept of arm {arm!r}, only of {', '.join(RECORDED)}")
    folder = home.models(scale)
    wanted = [(arm, seed) for seed in seeds for arm in arms]
    needed = {"anchor" if ARMS[arm].start == "anchor" else "base" for arm, _ in wanted}
    missing = [name for name in ("base", "teacher", "anchor") if not (folder / name).is_dir()]
    jobs = []
    if "base" in missing and needed:
        jobs.append(Job("base", 0, (), "base"))
    if "teacher" in missing and "anchor" in needed:
        jobs.append(Job("teacher", 0, (), "teacher"))
    if "anchor" in missing and "anchor" in needed:
        jobs.append(Job("sft", 0, ("base",), "anchor"))
        wanted = [pair for pair in wanted if pair != ("sft", 0)]
    for arm, seed in wanted:
        jobs.append(Job(arm, seed, ("anchor", "teacher") if ARMS[arm].start == "anchor" else ("base",)))
    return jobs


def model_jobs() -> list[Job]:
    """List the jobs that make the three models of a lab."""
    return [Job("teacher", 0, (), "teacher"), Job("base", 0, (), "base"), Job("sft", 0, ("base",), "anchor")]


_counter = None


def _take(counter) -> None:
    global _counter
    _counter = counter


def _count(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


def _work(job: Job, scale_name: str, home: Home, record: bool) -> None:
    scale = SCALES[scale_name]
    run = train(job.arm, job.seed, scale, home=home, on_steps=_count)
    if job.makes:
        install_model(run, home, scale, job.makes)
    if record and job.arm in RECORDED:
        write_record(job.arm, job.seed, scale, home)


def build(jobs: list[Job], scale: Scale, home: Home, *, record: bool = True, processes: int = 2) -> None:
    """Run ``jobs`` in ``processes`` processes under one bar; what is already there is not done again.

    Raises:
        OpdlabError: if a job fails; the others' results stay, and the same call goes on from there.
    """
    total = sum(scale.recipes[job.arm].steps for job in jobs)
    counter = CONTEXT.Value("q", 0)
    waiting, running, made = list(jobs), {}, {path.name for path in home.models(scale).glob("*") if path.is_dir()}
    made -= {job.makes for job in jobs}
    with (
        tqdm(total=total, unit="step", desc=f"{len(jobs)} runs at {scale.name}") as bar,
        workers(processes, _take, counter) as pool,
    ):
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= made][: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(_work, job, scale.name, home, record)] = job
            if not running:
                raise OpdlabError(f"nothing makes the models that {waiting[0].arm!r} needs: run 'opdlab models' first")
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as problem:
                    raise OpdlabError(
                        f"the process of {job.arm} seed {job.seed} was killed, perhaps for lack of memory; the same "
                        "command goes on from its last checkpoint"
                    ) from problem
                made.add(job.makes)
            bar.set_postfix_str(", ".join(f"{job.arm} {job.seed}" for job in running.values()))
            bar.n = counter.value
            bar.refresh()


FIGURES = {
    "sampled accuracy": ("evaluations", "sampled"),
    "greedy accuracy": ("evaluations", "greedy"),
    "bf16 sparsity": ("matrices", "sparsity"),
    "left angle": ("matrices", "angle_left_mean"),
    "NSS": ("matrices", "nss"),
    "low-magnitude overlap": ("matrices", "low_overlap_a30"),
    "principal overlap": ("matrices", "principal_overlap_a30"),
    "Frobenius norm": ("matrices", "frobenius"),
    "stable rank": ("matrices", "stable_rank"),
}


def end_figures(tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Return the figures of a run's end point that a replication is judged by: means over matrices, last accuracies."""
    return {
        name: float(tables[table][column].iloc[-1] if table == "evaluations" else tables[table][column].mean())
        for name, (table, column) in FIGURES.items()
    }


def compare(
    scale: Scale, recorded: Home, repeated: Home, arms: tuple[str, ...], seeds: tuple[int, ...]
) -> pd.DataFrame:
    """Compare repeated runs with the record, one row per run and figure.

    A run agrees ``bit for bit`` if its last weights are the recorded ones. Elsewhere (another processor or version)
    training amplifies the first rounding difference, so a figure agrees if it lies ``within the spread``: the 99 %
    prediction interval of the recorded seeds. Anything else is ``outside``.
    """
    rows = []
    for arm in arms:
        records = {seed: read_record(recorded.records(scale) / f"{arm}-seed{seed}") for seed in scale.seeds}
        figures = {seed: end_figures(tables) for seed, (_, tables) in records.items()}
        for seed in seeds:
            description, tables = read_record(find_tables(arm, seed, scale, repeated))
            same_bits = description["weights"] == records[seed][0]["weights"]
            same_machine = description["provenance"] == records[seed][0]["provenance"]
            for name, value in end_figures(tables).items():
                spread = prediction_interval([figures[other][name] for other in scale.seeds])
                verdict = "outside"
                if same_bits:
                    verdict = "bit for bit"
                elif spread.low <= value <= spread.high:
                    verdict = "within the spread"
                rows.append(
                    {
                        "run": f"{arm} seed {seed}",
                        "figure": name,
                        "recorded": figures[seed][name],
                        "repeated": value,
                        "low": spread.low,
                        "high": spread.high,
                        "verdict": verdict,
                        "same machine": same_machine,
                    }
                )
    return pd.DataFrame(rows)

"""Building the lab from nothing, and comparing what comes out with the record.

The jobs of a scale are its models and its recorded runs. They run as one-thread processes side by side, in the order
in which they need each other: base -> SFT -> anchor, teacher, then what starts from the anchor, and last the projected
runs that take their directions from another run.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import pandas as pd
from tqdm import tqdm

from opdlab.arms import ARMS, RECORDED, Arm, get_arm, maker_of
from opdlab.errors import OpdlabError
from opdlab.processes import CONTEXT, workers
from opdlab.records import find_tables, read_record, write_record
from opdlab.runs import Home, source_of
from opdlab.scales import SCALES, Scale
from opdlab.stats import prediction_interval
from opdlab.training import install_model, train


@dataclass(frozen=True)
class Job:
    """One run, the model folders and runs that it waits for, and the model folder that it makes (or "")."""

    arm: str
    seed: int
    needs: tuple[str, ...]
    makes: str = ""

    @property
    def name(self) -> str:
        """The name by which other jobs wait for this run."""
        return f"{self.arm}-seed{self.seed}"


def plan(
    scale: Scale, home: Home, arms: tuple[str, ...], seeds: tuple[int, ...] = (), models: tuple[str, ...] = ()
) -> list[Job]:
    """List the jobs that give the records of ``arms`` and the model folders ``models``, those they need first.

    Args:
        scale: at which scale.
        home: what is already among its models is not made again.
        arms: of which a record is kept.
        seeds: of these seeds; by default, of all seeds that the scale has for an arm.
        models: names of model folders.

    Raises:
        OpdlabError: if an arm is unknown, or one that no record is kept of; or if no arm makes a model.
    """
    jobs: dict[str, Job] = {}

    def need_model(folder: str) -> tuple[str, ...]:
        if not folder or (home.models(scale) / folder).is_dir():
            return ()
        need_run(maker_of(folder), 0)
        return (folder,)

    def need_run(arm: Arm, seed: int) -> str:
        name = f"{arm.name}-seed{seed}"
        if name in jobs:
            return name
        needs = [*need_model(arm.start), *need_model(arm.teacher)]
        source = source_of(arm, seed, scale)
        if source:
            needs.append(need_run(get_arm(source[0]), source[1]))
        makes = arm.makes if seed == 0 and not (home.models(scale) / arm.makes).is_dir() else ""
        jobs[name] = Job(arm.name, seed, tuple(needs), makes)
        return name

    for folder in models:
        need_model(folder)
    for arm in map(get_arm, arms):
        if arm.name not in RECORDED:
            raise OpdlabError(f"no record is kept of arm {arm.name!r}, as it only makes a model")
    # Seed by seed, so that what is stopped halfway can be compared across arms.
    most = max((len(seeds or scale.seeds_of(arm)) for arm in arms), default=0)
    for i in range(most):
        for arm in arms:
            of_arm = seeds or scale.seeds_of(arm)
            if i < len(of_arm):
                need_run(get_arm(arm), of_arm[i])
    return list(jobs.values())


def all_models() -> tuple[str, ...]:
    """Return the names of all model folders of a lab."""
    return tuple(dict.fromkeys(arm.makes for arm in ARMS.values() if arm.makes))


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
    total = sum(scale.recipe(job.arm).steps for job in jobs)
    counter = CONTEXT.Value("q", 0)
    waiting, running, made = list(jobs), {}, set()
    with (
        tqdm(total=total, unit="step", desc=f"{len(jobs)} runs at {scale.name}") as bar,
        workers(processes, _take, counter) as pool,
    ):
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= made][: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(_work, job, scale.name, home, record)] = job
            if not running:
                raise OpdlabError(f"nothing makes {', '.join(waiting[0].needs)}, which {waiting[0].arm!r} needs")
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
                made |= {job.makes, job.name}
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
    """Compare repeated runs with the record, one row per run and figure; an arm without one of the seeds has no row.

    A run agrees ``bit for bit`` if its last weights are the recorded ones. Elsewhere (another processor or version)
    training amplifies the first rounding difference, so a figure agrees if it lies ``within the spread``: the 99 %
    prediction interval of the recorded seeds. Anything else is ``outside``.
    """
    rows = []
    for arm in arms:
        of_arm = scale.seeds_of(arm)
        records = {seed: read_record(recorded.records(scale) / f"{arm}-seed{seed}") for seed in of_arm}
        figures = {seed: end_figures(tables) for seed, (_, tables) in records.items()}
        for seed in (seed for seed in seeds if seed in of_arm):
            description, tables = read_record(find_tables(arm, seed, scale, repeated))
            same_bits = description["weights"] == records[seed][0]["weights"]
            same_machine = description["provenance"] == records[seed][0]["provenance"]
            for name, value in end_figures(tables).items():
                spread = prediction_interval([figures[other][name] for other in of_arm])
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

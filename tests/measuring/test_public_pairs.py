"""scripts/public_pairs.py without a network: tiny folders stand for the public models."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from opdlab.errors import OpdlabError
from opdlab.geometry import bf16_sparsity, describe
from opdlab.models.checkpoints import open_checkpoint

SCRIPT = "scripts/public_pairs.py"


@pytest.fixture
def hub(script, pair, tmp_path, monkeypatch):
    """A hub with the models a/base, a/one and a/two, whose sparsity is published, and a cache in ``tmp_path``."""
    base, tuned = pair
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    # In one piece each, by the library: what the script has to find in chunks.
    shares = {name: (bf16_sparsity(before.read(name), after.read(name)), before.read(name)) for name in before.pieces}

    def share(names):
        return 100 * sum(shares[n][0] * shares[n][1].numel() for n in names) / sum(shares[n][1].numel() for n in names)

    inside = [n for n in shares if describe(n).block in ("attention", "mlp")]
    hub = SimpleNamespace(all=share(shares), matrices=share(inside), asked=[], cache=tmp_path / "cache")

    def download(repository, folder):
        hub.asked.append(repository)
        shutil.copytree(base if repository == "a/base" else tuned, folder, dirs_exist_ok=True)

    monkeypatch.setattr(script, "download", download)
    monkeypatch.setattr(script, "CHUNK", 100)
    pairs = tuple(script.Pair("a/base", tuned, "4B", hub.all + 0.5, hub.all) for tuned in ("a/one", "a/two"))
    monkeypatch.setattr(script, "PAIRS", pairs)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**11))
    hub.run = lambda *options: script.main(["--cache", str(hub.cache), *options])
    return hub


def test_the_shares_are_those_of_the_library(script, hub, capsys):
    assert hub.run() == 0
    found = script.Cache(hub.cache).results["one"]
    assert found["all"] == pytest.approx(hub.all, abs=1e-9)
    assert found["matrices"] == pytest.approx(hub.matrices, abs=1e-9)
    assert 0 < found["matrices_parameters"] < found["parameters"]
    assert found["all"] != pytest.approx(found["matrices"], abs=1e-3)
    assert (found["dtypes"], found["revisions"]) == (["bfloat16", "bfloat16"], [None, None])
    header, *rows = capsys.readouterr().out.splitlines()[-3:]
    assert header.split() == [
        "pair",
        "paper",
        "2511.08567",
        "all",
        "weights",
        "matrices",
        "difference",
        "within",
        "1",
        "point",
    ]
    assert rows[0].split()[0] == "one" and rows[0].split()[-2:] == ["-0.50", "yes"]


def test_a_pair_outside_is_status_1(script, hub, monkeypatch, capsys):
    inside, outside = script.PAIRS
    monkeypatch.setattr(script, "PAIRS", (inside, outside._replace(paper=hub.all - 1.01)))
    assert hub.run() == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("+1.01  NO")
    assert hub.run("--pair", "one") == 0


def test_what_was_measured_is_not_measured_again(script, hub, monkeypatch):
    assert hub.run("--pair", "one") == 0
    assert hub.asked == ["a/base", "a/one"]
    assert hub.run("--pair", "one") == 0
    assert hub.asked == ["a/base", "a/one"]
    assert hub.run() == 0
    assert hub.asked == ["a/base", "a/one", "a/base", "a/two"]
    # Another model under the same name is another pair.
    monkeypatch.setattr(script, "PAIRS", (script.PAIRS[0]._replace(tuned="b/one"),))
    assert hub.run() == 0
    assert hub.asked[-1] == "b/one"


def test_a_pair_that_fails_leaves_the_finished_ones(script, hub, monkeypatch, capsys):
    def download(repository, folder, fetch=script.download):
        if repository == "a/two":
            raise OpdlabError("no network")
        fetch(repository, folder)

    with monkeypatch.context() as patch:
        patch.setattr(script, "download", download)
        assert hub.run() == 2
    assert capsys.readouterr().err.splitlines()[-1] == "public_pairs: no network"
    assert list(script.Cache(hub.cache).results) == ["one"]
    assert hub.run() == 0
    assert hub.asked == ["a/base", "a/one", "a/base", "a/two"]  # the base is completed, if it has to be


def test_only_what_it_downloaded_is_deleted(script, hub, pair):
    shutil.copytree(pair[1], hub.cache / "a" / "one")
    assert hub.run("--pair", "one") == 0
    assert hub.asked == ["a/base"]
    assert (hub.cache / "a" / "one").is_dir() and not (hub.cache / "a" / "base").exists()
    # Two pairs share a model: it stays for the second.
    assert hub.run("--pair", "two") == 0
    assert hub.asked == ["a/base", "a/base", "a/two"]
    assert script.Cache(hub.cache).downloaded == []


def test_a_shared_base_is_downloaded_once_and_kept_on_demand(script, hub):
    assert hub.run("--keep") == 0
    assert hub.asked == ["a/base", "a/one", "a/two"]
    (hub.cache / "results.json").unlink()
    assert hub.run() == 0
    assert len(hub.asked) == 3
    assert all((hub.cache / "a" / name).is_dir() for name in ("base", "one", "two"))


def test_the_disk_is_looked_at_first(script, hub, monkeypatch, capsys):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**9))
    assert hub.run() == 2
    assert "one needs 19 GB more in" in (said := capsys.readouterr().err) and "where 5 GB are free" in said
    assert hub.asked == []


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConnectionError("no route to host"), "a/base cannot be downloaded (no route to host): check the network"),
        (OSError(28, "No space left on device"), "the disk is full: a/base is incomplete"),
    ],
)
def test_a_download_that_fails_says_why(script, tmp_path, monkeypatch, raised, said):
    def snapshot_download(repository, local_dir, allow_patterns):
        assert allow_patterns == ["*.safetensors", "*.json"]
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(OpdlabError) as problem:
        script.download("a/base", tmp_path)
    assert str(problem.value).startswith(said)


def test_without_a_hub_there_is_one_sentence(script, tmp_path, monkeypatch, capsys):
    # tests/conftest.py sets HF_HUB_OFFLINE, so that nothing is asked for.
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**11))
    assert script.main(["--cache", str(tmp_path), "--pair", "Polaris-4B-Preview"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("public_pairs: Qwen/Qwen3-4B cannot be downloaded (")


def test_models_that_do_not_belong_together_are_refused(hub, pair, capsys):
    shutil.copytree(pair[1], hub.cache / "a" / "one")
    file = next((hub.cache / "a" / "one").glob("*.safetensors"))
    save_file({"model.more": load_file(file).popitem()[1]}, file.with_name("model.safetensors"))
    assert hub.run("--pair", "one") == 2
    assert "one has 0: give a model and what was tuned from it" in capsys.readouterr().err


def test_a_broken_file_of_results_is_named(hub, capsys):
    hub.cache.mkdir()
    (hub.cache / "results.json").write_text("[]")
    assert hub.run() == 2
    assert "results.json cannot be read" in capsys.readouterr().err


def test_the_published_pairs(script):
    published = {pair.name: (pair.paper, pair.earlier) for pair in script.PAIRS}
    assert published == {
        "GT-Qwen3-8B-Base-MATH": (79.0, 79.9),
        "Klear-Reasoner-8B-SFT": (0.6, 0.6),
        "Klear-Reasoner-8B": (69.9, 69.5),
        "UniReason-Qwen3-14B-think-SFT": (18.8, 18.8),
        "Polaris-4B-Preview": (79.9, 79.3),
    }

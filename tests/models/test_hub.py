"""Models named as on the Hugging Face hub, against a small server that speaks as the hub does."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from opdlab.cli import main

COMMIT = {"main": "a" * 40, "step-20": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """Serves the folders of ``root`` as models of one owner; a branch other than main is a folder NAME@BRANCH."""

    root: Path
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        parts = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        owner, name, what, revision, *rest = [*parts, "", "", ""]
        branch = next((branch for branch, commit in COMMIT.items() if revision in (branch, commit)), None)
        folder = self.root / (name if branch == "main" else f"{name}@{branch}")
        if branch is None or owner != "lab" or not folder.is_dir():
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if what == "revision":
            return self.send(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT[branch]}).encode(), body)
        if what == "tree":
            entries = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}
                for path in files
            ]
            return self.send(200, json.dumps(entries).encode(), body)
        path = folder / "/".join(part for part in rest if part)
        if body:
            self.asked.append(path.name)
        content = path.read_bytes()
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.send(200, content, body, {"ETag": etag, "X-Repo-Commit": COMMIT[branch]})

    def send(self, status, content, body, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder whose folders are the models of "lab" on the hub, and the list of files that were fetched."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"root": tmp_path / "hub", "asked": []}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield server.RequestHandlerClass
    server.shutdown()
    server.server_close()


def tables(out):
    return pd.read_csv(out / "matrices.csv")


def same(one, other):
    """On some processors the last digit of a number depends on where its tensor lies in memory."""
    pd.testing.assert_frame_equal(tables(one), tables(other), rtol=1e-12)


def test_models_of_the_hub_are_fetched_and_measured(hub, pair, tmp_path, capsys):
    base, tuned = pair
    hub.root.mkdir()
    (hub.root / "base").symlink_to(base)
    (hub.root / "tuned").mkdir()
    for path in tuned.iterdir():
        (hub.root / "tuned" / path.name).symlink_to(path)
    (hub.root / "tuned@step-20").symlink_to(base)
    # The same weights in other formats, which nobody needs.
    for name in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "README.md"):
        (hub.root / "tuned" / name).parent.mkdir(exist_ok=True)
        (hub.root / "tuned" / name).write_bytes(b"never asked for")
    assert main(["measure", str(base), str(tuned), "--out", "here", "--no-nulls"]) == 0
    assert main(["measure", "lab/base", "lab/tuned", "--out", "there", "--no-nulls"]) == 0
    same(tmp_path / "here", tmp_path / "there")
    needed = {path.name for folder in pair for path in folder.iterdir()}
    assert set(hub.asked) <= needed and "model.safetensors.index.json" in hub.asked
    fetched = len(hub.asked)
    # A branch, and what is in the cache already.
    assert main(["measure", "lab/tuned@step-20", "lab/tuned@main", "--out", "branch", "--no-nulls"]) == 0
    same(tmp_path / "branch", tmp_path / "here")
    assert len(hub.asked) <= fetched + len(list(base.iterdir()))
    capsys.readouterr()
    assert main(["measure", "lab/base", "lab/nothing@v2"]) == 2
    assert "run 'hf download lab/nothing --revision v2 --local-dir FOLDER'" in capsys.readouterr().err


def test_adapters_of_the_hub(hub, pair, tmp_path):
    adapter = hub.root / "adapter"
    adapter.mkdir(parents=True)
    (hub.root / "base").symlink_to(pair[0])
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    rows, cols = load_file(pair[0] / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape
    lora = {f"{module}.lora_A.weight": torch.randn(2, cols), f"{module}.lora_B.weight": torch.randn(rows, 2)}
    save_file(lora, adapter / "adapter_model.safetensors")
    assert main(["measure", "lab/base", "lab/adapter", "--out", "out", "--no-nulls"]) == 0
    assert tables(tmp_path / "out")["matrix"].str.contains("q_proj").any()


def test_without_a_network_it_says_how(pair, capsys):
    assert main(["measure", "Qwen/Qwen3-0.6B-Base", str(pair[1])]) == 2
    said = capsys.readouterr().err
    assert "where there is a network run 'hf download Qwen/Qwen3-0.6B-Base --local-dir FOLDER'" in said

"""Fetching of checkpoints from a hub that the tests run, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from qsens.config import load_sweep
from tests.tools.hub_server import COMMIT, Repository, serving

TOKEN = "hf_aTokenThatMustNotShow"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "qsens", "fetch-model", *words, "--json"]


def environment(endpoint: str, tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), **more}


def fetch(
    endpoint: str, tmp_path: Path, *words: str, **more: str
) -> tuple[int, dict[str, Any], str]:
    """Run the command; return its exit code, its JSON, and all that it printed."""
    done = subprocess.run(
        command(*words),
        env=environment(endpoint, tmp_path, **more),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed, printed
    return done.returncode, json.loads(done.stdout), printed


@pytest.fixture
def repository() -> Repository:
    """A checkpoint of two shards with what a repository holds besides."""
    shards = {
        "model-00001-of-00002.safetensors": {"a.weight": np.arange(6, dtype=np.float32)},
        "model-00002-of-00002.safetensors": {"b.weight": np.ones((2, 3), np.float32)},
    }
    index = {"weight_map": {key: name for name, held in shards.items() for key in held}}
    return Repository(
        "owner/tiny",
        {
            "README.md": b"# tiny\n",
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "tokenizer_config.json": b"{}",
            "preprocessor_config.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "modeling_tiny.py": b"raise SystemExit",
            "pytorch_model.bin": b"\x80\x04.",
            "consolidated.safetensors": save({"a.weight": np.zeros(6, np.float32)}),
            "original/params.json": b"{}",
            "onnx/config.json": b"{}",
            "model.safetensors.index.json": json.dumps(index).encode(),
            **{name: save(held) for name, held in shards.items()},
        },
    )


def big(repository: Repository) -> str:
    """Make the first shard 1 MiB, random, and return its name."""
    name = "model-00001-of-00002.safetensors"
    values = np.random.default_rng(0).integers(0, 255, 1 << 20, dtype=np.uint8)
    repository.files[name] = save({"a.weight": values})
    return name


def test_whole_checkpoint_and_nothing_else(repository: Repository, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with serving(repository) as endpoint:
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", str(target))
        asked = len(repository.asked)
        again, second, _ = fetch(endpoint, tmp_path, "owner/tiny", str(target))
    assert (code, again) == (0, 0)
    names = {path.name for path in target.iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "qsens-source.json",
    }
    held = load_file(target / "model-00001-of-00002.safetensors")
    assert held["a.weight"].tolist() == [0, 1, 2, 3, 4, 5]
    expected = sum(len(repository.files[name]) for name in names - {"qsens-source.json"})
    assert said["bytes"] == said["downloaded_bytes"] == expected
    assert said["commit"] == COMMIT
    record = json.loads((target / "qsens-source.json").read_text())
    assert (record["repository"], record["revision"]) == ("owner/tiny", "main")
    assert record["commit"] == COMMIT
    assert second["downloaded_bytes"] == 0
    assert len(repository.asked) == asked + 1  # only the listing
    leftovers = {path.name for path in tmp_path.iterdir()}
    assert leftovers <= {"out", "hf", ".out.lock"}


def test_files_come_from_the_commit_that_was_resolved(
    repository: Repository, tmp_path: Path
) -> None:
    with serving(repository) as endpoint:
        fetch(endpoint, tmp_path, "owner/tiny", "out", "--revision", "v1")
    files = [path for _, path, _ in repository.asked if "/resolve/" in path]
    assert files
    assert all(f"/resolve/{COMMIT}/" in path for path in files)
    record = json.loads((tmp_path / "out/qsens-source.json").read_text())
    assert (record["revision"], record["commit"]) == ("v1", COMMIT)


def test_goes_on_after_a_cut_connection(repository: Repository, tmp_path: Path) -> None:
    name = big(repository)
    repository.cut[name] = 300_001
    with serving(repository) as endpoint:
        code, _, _ = fetch(endpoint, tmp_path, "owner/tiny", "out")
    assert code == 0
    assert (tmp_path / "out" / name).read_bytes() == repository.files[name]
    ranges = [headers.get("range") for role, _, headers in repository.asked if role == "cdn"]
    assert ranges == [None, None, "bytes=300001-"]


def test_goes_on_after_the_process_died(repository: Repository, tmp_path: Path) -> None:
    name = big(repository)
    repository.stall[name] = 300_001
    with serving(repository) as endpoint:
        started = subprocess.Popen(
            command("owner/tiny", "out"),
            env=environment(endpoint, tmp_path),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert repository.stalled.wait(60)
        (partial,) = tmp_path.glob(".out.*.partial")
        part = partial / f"{name}.part"
        until = time.monotonic() + 30
        while part.stat().st_size < 300_001 and time.monotonic() < until:
            time.sleep(0.05)
        started.kill()
        started.wait()
        assert not (tmp_path / "out").exists()
        assert part.stat().st_size == 300_001
        repository.release.set()
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", "out")
    assert code == 0
    assert (tmp_path / "out" / name).read_bytes() == repository.files[name]
    assert said["downloaded_bytes"] == len(repository.files[name]) - 300_001
    assert not list(tmp_path.glob(".out.*.partial"))


def test_content_other_than_listed_is_not_kept(repository: Repository, tmp_path: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    repository.corrupt.add(name)
    with serving(repository) as endpoint:
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", "out")
        assert code == 75
        assert name in said["what"]
        assert not (tmp_path / "out").exists()
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", "out")
    assert code == 0
    assert said["downloaded_bytes"] == len(repository.files[name])


def test_no_space_is_said_before_anything_large_comes(
    repository: Repository, tmp_path: Path
) -> None:
    name = "model-00001-of-00002.safetensors"
    repository.declared[name] = 1 << 60
    with serving(repository) as endpoint:
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", "out")
    assert code == 75
    assert f"{1 << 30:.2f} GiB are still to be downloaded" in said["what"]
    assert name not in repository.sent
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words", "code", "said"),
    [
        ({}, ["owner/tiny", "--revision", "v9"], 2, "has no revision 'v9'"),
        ({}, ["owner/other"], 2, "does not exist, or is private, and no token was sent"),
        ({"token": TOKEN}, ["owner/tiny"], 2, "is private, and no token was sent"),
        ({"gated": True}, ["owner/tiny"], 2, "asks for its owner's consent"),
        ({"status": 503}, ["owner/tiny"], 75, "status 503"),
        ({"status": 418}, ["owner/tiny"], 2, "status 418"),
        ({}, ["owner//tiny"], 2, "is no repository's name"),
        ({}, ["qwen9_vl"], 2, "unknown model 'qwen9_vl'"),
        ({}, ["tiny_qwen3_vl"], 2, "names no repository"),
    ],
)
def test_one_message_for_what_the_hub_refuses(
    change: dict[str, Any],
    words: list[str],
    code: int,
    said: str,
    repository: Repository,
    tmp_path: Path,
) -> None:
    for name, value in change.items():
        setattr(repository, name, value)
    with serving(repository) as endpoint:
        done, answer, _ = fetch(endpoint, tmp_path, *words)
    assert done == code
    assert said in answer["what"]
    assert answer["remedy"]


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["config.json"], "has no config.json"),
        (["model-00002-of-00002.safetensors"], "names model-00002-of-00002.safetensors"),
        (["model.safetensors.index.json"], "holds neither model.safetensors nor"),
        (
            ["*.safetensors", "model.safetensors.index.json"],
            "holds weights as pickle only",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    gone: list[str], said: str, repository: Repository, tmp_path: Path
) -> None:
    for name in list(repository.files):
        if any(Path(name).match(pattern) for pattern in gone) and "/" not in name:
            del repository.files[name]
    with serving(repository) as endpoint:
        code, answer, _ = fetch(endpoint, tmp_path, "owner/tiny", "out")
    assert code == 2
    assert said in answer["what"]
    assert not (tmp_path / "out").exists()


def test_unreachable_hub_may_pass(tmp_path: Path) -> None:
    code, said, _ = fetch("http://127.0.0.1:9", tmp_path, "owner/tiny", "out")
    assert code == 75
    assert "the connection failed" in said["what"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"HF_ENDPOINT": "ftp://127.0.0.1"}, "HF_ENDPOINT is no address of a hub"),
        ({"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT is no address of a hub"),
        ({"HF_TOKEN": "hf_\u00e4secret"}, "the token holds characters that cannot be sent"),
    ],
)
def test_a_broken_environment_is_said(
    more: dict[str, str], said: str, repository: Repository, tmp_path: Path
) -> None:
    with serving(repository) as endpoint:
        given = {"HF_ENDPOINT": endpoint} | more
        code, answer, printed = fetch(
            given["HF_ENDPOINT"],
            tmp_path,
            "owner/tiny",
            "out",
            **{name: value for name, value in more.items() if name != "HF_ENDPOINT"},
        )
    assert code == 2
    assert said in answer["what"]
    assert "secret" not in printed


def test_a_directory_that_cannot_be_made_is_said(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving(repository) as endpoint:
        code, answer, _ = fetch(endpoint, tmp_path, "owner/tiny", "file/below/out")
    assert (code, repository.asked) == (2, [])
    assert "cannot be written to: Not a directory" in answer["what"]


def test_offline_needs_what_is_there(repository: Repository, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    with serving(repository) as endpoint:
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", "out", **offline)
        assert (code, repository.asked) == (2, [])
        assert "HF_HUB_OFFLINE" in said["what"]
        fetch(endpoint, tmp_path, "owner/tiny", "out")
        asked = len(repository.asked)
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", "out", **offline)
        assert (code, said["commit"]) == (0, COMMIT)
        assert len(repository.asked) == asked
        (tmp_path / "out/tokenizer.json").unlink()
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", "out", **offline)
    assert code == 2


def test_another_checkpoint_is_left_alone(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    with serving(repository) as endpoint:
        code, said, _ = fetch(endpoint, tmp_path, "owner/tiny", "out")
    assert code == 2
    assert "holds files" in said["what"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_token_opens_the_repository_and_shows_nowhere(
    repository: Repository, tmp_path: Path
) -> None:
    repository.token = TOKEN
    with serving(repository) as endpoint:
        code, _, printed = fetch(
            endpoint, tmp_path, "owner/tiny", "out", HF_TOKEN=TOKEN, HF_DEBUG="1"
        )
        wrong, _, refused = fetch(endpoint, tmp_path, "owner/tiny", "no", HF_TOKEN=f"{TOKEN}x")
        repository.cut["model-00001-of-00002.safetensors"] = 10
        repository.status = None
        cut, _, resumed = fetch(endpoint, tmp_path, "owner/tiny", "cut", HF_TOKEN=TOKEN)
    assert (code, wrong, cut) == (0, 2, 0)
    assert "the token that was sent does not open it" in refused
    for text in (printed, refused, resumed):
        assert TOKEN not in text
    for text in (refused, resumed):
        assert "do-not-print-me" not in text
    for role, _, headers in repository.asked:
        if role == "cdn":
            assert "authorization" not in headers
    tokens = {h.get("authorization") for role, _, h in repository.asked if role == "hub"}
    assert tokens == {f"Bearer {TOKEN}", f"Bearer {TOKEN}x"}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes()


def test_path_of_another_checkpoint_keeps_no_repository() -> None:
    override = ["model=qwen3_vl_4b_instruct", "model.path=/somewhere/Other"]
    assert load_sweep("single", override).config.model.hub.repository is None

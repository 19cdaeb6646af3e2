"""What a run of the DAG may set: a form must not read the server's files, or write there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qsens.config import Roots
from qsens.errors import UserError
from qsens_airflow.limits import DATA_ROOTS, load_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """Roots apart from each other; the server's own model file names a path outside them."""
    monkeypatch.delenv(DATA_ROOTS, raising=False)
    own = tmp_path / "configs"
    for name in ("root", "results", "configs/model", "configs/dataset", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (own / "model" / "mine.yaml").write_text(
        f"path: {tmp_path}/outside/mine\ntrust_remote_code: true\n"
    )
    (own / "dataset" / "mine.yaml").write_text(f"name: mine\ndirectory: {tmp_path}/outside\n")
    return Roots(
        root=tmp_path / "root", results=tmp_path / "results", configs=(own, ROOT / "configs")
    )


def test_paths_below_the_roots_pass(roots: Roots, tmp_path: Path) -> None:
    config = load_run("demo-text", ["model.path=models/other"], roots)
    assert config.model.path == tmp_path / "root" / "models" / "other"
    load_run("demo-text", [f"model.path={tmp_path}/results/x", "autoquant.score_size=64"], roots)


def test_what_the_servers_files_say_is_trusted(roots: Roots, tmp_path: Path) -> None:
    config = load_run("demo-text", ["model=mine", "dataset=mine"], roots)
    assert config.model.path == tmp_path / "outside" / "mine"
    assert config.model.trust_remote_code
    assert config.dataset[0].directory == tmp_path / "outside"


def test_more_directories_can_be_allowed(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ROOTS, os.pathsep.join(["/nowhere", f"{tmp_path}/outside"]))
    load_run("demo-text", [f"model.path={tmp_path}/outside/x"], roots)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.path=/etc", "model.path"),
        ("model.path=../outside/x", "model.path"),
        ("model.path=~/x", "model.path"),
        ("model.path={root}/link/x", "model.path"),
        ("dataset.directory=/etc", "dataset.directory"),
        ("dataset.images=/etc", "dataset.images"),
        ("dataset.images={root}/link/x", "dataset.images"),
        ("dataset.files={{small: ../../../etc/passwd}}", "dataset.files.small"),
        ("dataset.files={{small: /etc/passwd}}", "dataset.files.small"),
        ("model.trust_remote_code=true", "model.trust_remote_code"),
        ("runner.output_dir=x", "runner.output_dir"),
        ("dag.pool=other", "dag.pool"),
    ],
)
def test_what_a_run_may_not_set_is_refused_by_name(
    roots: Roots, tmp_path: Path, override: str, key: str
) -> None:
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="run") as caught:
        load_run(
            "demo-text", ["dataset.size=small", override.format(root=tmp_path / "root")], roots
        )
    assert caught.value.where.startswith(key)


# Below the directory that holds the root and the results.
NO_CAPTIONS = (
    "root/airflow/other.txt",
    "root/airflow/simple_auth_manager_passwords.json.generated",
    "root/logs/dag/attempt=1.txt",
    "root/airflow.cfg",
    "root/passwords.txt",
    "root/.airflow/passwords.txt",
    "root/.env.txt",
    "root/data/.hidden/captions.txt",
    "results/.cells/0123/manifest.jsonl",
    "results/.plans/run/x.txt",
)


@pytest.fixture
def state(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Airflow's own files below the root, where `make up` and others have them, and qsens's."""
    home = roots.root / "airflow"
    for name in (*NO_CAPTIONS, "root/data/captions.txt"):
        path = roots.root.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret\n", encoding="utf-8")
    monkeypatch.setenv("AIRFLOW_HOME", str(home))
    monkeypatch.setenv("AIRFLOW_CONFIG", str(roots.root / "airflow.cfg"))
    monkeypatch.setenv("AIRFLOW__LOGGING__BASE_LOG_FOLDER", str(roots.root / "logs"))
    monkeypatch.setenv(
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE", str(roots.root / "passwords.txt")
    )
    return home


def refused(roots: Roots, override: str) -> UserError:
    with pytest.raises(UserError, match="no run may read") as caught:
        load_run("demo-text", ["dataset.size=small", override], roots)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


@pytest.mark.parametrize("name", NO_CAPTIONS)
@pytest.mark.usefixtures("state")
def test_files_of_airflow_and_qsens_are_no_captions(roots: Roots, name: str) -> None:
    file = roots.root.parent / name
    assert file.is_file()
    for path in (file, f"../../../{name}"):
        directory = roots.root / "a" / "b"
        directory.mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match="no run may read") as caught:
            load_run(
                "demo-text",
                [
                    "dataset.size=small",
                    f"dataset.directory={directory}",
                    f"dataset.files={{small: '{path}'}}",
                ],
                roots,
            )
        assert caught.value.where.startswith("dataset.files.small")
    # Through links to the file, and to the directory that holds it.
    (roots.root / "data" / "link.txt").symlink_to(file)
    (roots.root / "data" / "link").symlink_to(file.parent)
    for link in ("link.txt", f"link/{file.name}"):
        override = f"dataset.files={{small: '{roots.root}/data/{link}'}}"
        assert refused(roots, override).where.startswith("dataset.files.small")


@pytest.mark.usefixtures("state")
def test_no_path_of_a_run_leads_to_state(roots: Roots) -> None:
    for key in ("model.path", "dataset.directory", "dataset.images"):
        for name in ("root/airflow", "root/.airflow", "results/.cells", "root/logs/dag"):
            where = refused(roots, f"{key}={roots.root.parent / name}").where
            assert where.startswith("dataset" if key != "model.path" else key)


@pytest.mark.usefixtures("state")
def test_what_is_no_state_beside_it_passes(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("data/captions.txt", "airflows/captions.txt", "logs.txt", "a..b/c.txt"):
        load_run("demo-text", [f"dataset.files={{small: '{tmp_path}/root/{path}'}}"], roots)
    # A root below AIRFLOW_HOME, or below a hidden directory, is no state: its owner says so.
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    load_run("demo-text", [f"model.path={tmp_path}/root/models/x"], roots)
    monkeypatch.setenv(DATA_ROOTS, f"{tmp_path}/root/.cache/models")
    load_run("demo-text", [f"model.path={tmp_path}/root/.cache/models/x"], roots)
    assert refused(roots, f"model.path={tmp_path}/root/.cache/x").where.startswith("model.path")


@pytest.mark.parametrize(
    "override", ["runner={output_dir: x}", "dag.notify=[{notifier: os.system}]"]
)
def test_sections_are_set_in_files_alone(roots: Roots, override: str) -> None:
    with pytest.raises(UserError, match="section") as caught:
        load_run("demo-text", [override], roots)
    assert caught.value.where.startswith(override.partition("=")[0])


@pytest.mark.parametrize(
    "override",
    ["model.path=${oc.env:HOME}", "dataset.name=a${oc.env:HOME}", "runner={output_dir: '${x}'}"],
)
def test_interpolation_is_refused(roots: Roots, override: str) -> None:
    with pytest.raises(UserError, match="interpolation"):
        load_run("demo-text", [override], roots)


def test_an_escaped_interpolation_reads_nothing(
    roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    override = 'dataset.files={small: "\\u0024{oc.env:SECRET}"}'
    assert "${" not in override
    with pytest.raises(UserError) as caught:
        load_run("demo-text", ["dataset.size=small", override], roots)
    assert "hidden" not in str(caught.value)
    # What is escaped for YAML is text like any other.
    assert "\\u0024{oc.env:SECRET}" in caught.value.what

"""The compose file and the images: they resolve, and name only what is there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.compose import EXAMPLE, FILE, ROOT, Service, airflow_commands, example, services
from tests.compose import variables_of as _variables_of

SECRETS = (
    "AIRFLOW_FERNET_KEY",
    "AIRFLOW_SECRET_KEY",
    "AIRFLOW_JWT_SECRET",
    "AIRFLOW_ADMIN_PASSWORD",
    "POSTGRES_PASSWORD",
    "POSTGRES_CELERY_PASSWORD",
    "REDIS_PASSWORD",
)
FILLED = {name: value or f"the-{name.lower()}" for name, value in example().items()}
OWN = ("postgres", "redis")

# Runs with the pinned Airflow, in a home of its own: parses commands, looks up options.
PROBE = """
import json, sys
from airflow.cli.cli_parser import get_parser
from airflow.configuration import conf
asked = json.load(sys.stdin)
parser = get_parser()
parsed = [parser.parse_args(words).subcommand for words in asked["commands"]]
known = {(section, option) for section, body in conf.configuration_description.items()
         for option in body["options"]}
unknown = [option for option in asked["options"] if tuple(option) not in known]
print(json.dumps({"parsed": parsed, "unknown": unknown}))
"""


@pytest.fixture(scope="module")
def stack() -> dict[str, Service]:
    return services(FILLED)


@pytest.fixture(scope="module")
def airflow_services(stack: dict[str, Service]) -> list[Service]:
    return [service for service in stack.values() if service.name not in OWN]


def compose_config(env_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = shutil.which("docker-compose")
    if command is None:
        pytest.skip("docker-compose is not installed: apt-get install docker-compose")
    return subprocess.run(
        [command, "--file", str(FILE), "--env-file", str(env_file), *arguments, "config"],
        env={"PATH": os.environ["PATH"], "HOME": str(env_file.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_compose_resolves_it_as_the_tests_do(tmp_path: Path, stack: dict[str, Service]) -> None:
    env = tmp_path / ".env"
    env.write_text("".join(f"{name}={value}\n" for name, value in FILLED.items()))
    done = compose_config(env, "--profile", "gpu")
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)["services"]
    assert set(resolved) == set(stack)
    for name, service in stack.items():
        theirs = resolved[name].get("environment", {})
        assert {key: str(value) for key, value in theirs.items()} == service.environment
    without = yaml.safe_load(compose_config(env).stdout)["services"]
    # Compose 1 lists services of profiles that are off as well; a newer one does not.
    assert set(stack) - {"gpu-worker-0"} <= set(without)


@pytest.mark.parametrize("secret", SECRETS)
def test_compose_stops_without_a_secret(secret: str, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=f"set {secret} in .env"):
        services(FILLED | {secret: ""})
    env = tmp_path / ".env"
    env.write_text("".join(f"{name}={value}\n" for name, value in FILLED.items() if name != secret))
    done = compose_config(env)
    assert done.returncode != 0
    assert f"set {secret} in .env" in done.stderr


def test_no_secret_has_a_default() -> None:
    given = example()
    assert {name for name in given if given[name] == "" and name in SECRETS} == set(SECRETS)
    used = _variables_of(FILE.read_text(encoding="utf-8"))
    assert all(":-" not in used[name] for name in SECRETS)
    # Every password in the file is one of those secrets.
    for service in services(FILLED).values():
        for name, value in service.environment.items():
            if re.search(r"PASSWORD|SECRET|FERNET|AUTH$|CONN$|BACKEND|BROKER_URL", name):
                # A worker has no way into the database.
                assert "the-" in value or value == "sqlite://", name


def test_each_service_has_the_secrets_that_it_needs_and_no_other(
    stack: dict[str, Service],
) -> None:
    values = {name: FILLED[name] for name in SECRETS}
    found = {
        service.name: {name for name, value in values.items() if value in str(service.definition)}
        for service in stack.values()
    }
    database = {"POSTGRES_PASSWORD", "AIRFLOW_FERNET_KEY"}
    celery = {"REDIS_PASSWORD", "POSTGRES_CELERY_PASSWORD"}
    assert found == {
        "postgres": {"POSTGRES_PASSWORD", "POSTGRES_CELERY_PASSWORD"},
        "redis": {"REDIS_PASSWORD"},
        "init": database | {"AIRFLOW_ADMIN_PASSWORD"},
        "api-server": database | {"AIRFLOW_JWT_SECRET", "AIRFLOW_SECRET_KEY"},
        "scheduler": database | celery | {"AIRFLOW_JWT_SECRET"},
        "dag-processor": database,
        "triggerer": database,
        "worker": celery,
        "gpu-worker-0": celery,
    }


def test_no_secret_is_in_an_argument(stack: dict[str, Service]) -> None:
    values = [FILLED[name] for name in SECRETS]
    for service in stack.values():
        parts = ("command", "entrypoint", "healthcheck")
        words = str([service.definition.get(part, "") for part in parts])
        assert [value for value in values if value in words] == []
        # What a shell puts there: variables with a secret. `printf` is the shell's own program, and
        # the other one is a line of what Redis reads.
        hold = [name for name, text in service.environment.items() for value in values
                if value in text]  # fmt: skip
        for line in "\n".join(service.command).replace("\\\n", " ").splitlines():
            if any(f"${name}" in line for name in hold):
                assert line.startswith(("printf '%s", "requirepass "))
                assert not any(
                    f"${name}" in line.rpartition("| ")[2] for name in hold if "|" in line
                )


def test_every_service_is_confined(stack: dict[str, Service]) -> None:
    for name, service in stack.items():
        own = service.definition
        assert own["read_only"] is True
        assert own["cap_drop"] == ["ALL"]
        assert own["security_opt"] == ["no-new-privileges:true"]
        more = {"CHOWN", "SETGID", "SETUID"} if name == "init" else set()
        assert set(own.get("cap_add", [])) == more
        assert (own["user"].split(":")[0] in ("0", "root")) is (name == "init")
        assert "privileged" not in own
        # Temporary files have a place; triton loads libraries from there.
        if name != "redis":
            assert any(text.startswith("/tmp:") for text in own["tmpfs"])
        if name not in OWN:
            assert "exec" in own["tmpfs"][0]


def test_what_is_pulled_is_named_by_its_digest(stack: dict[str, Service]) -> None:
    digest = re.compile(r"[a-z]+:[\w.-]+@sha256:[0-9a-f]{64}")
    for service in stack.values():
        assert "build" in service.definition or digest.fullmatch(service.definition["image"])
    image = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    named = dict(re.findall(r"^ARG (\w+)=(\S+)$", image, re.MULTILINE))
    bases = re.findall(r"^FROM (\S+) AS (\w+)$", image, re.MULTILINE)
    assert [stage for _, stage in bases] == ["requirements", "airflow", "gpu"]
    for base, _ in bases:
        if base not in ("requirements", "airflow"):
            assert digest.fullmatch(named[base.strip("${}")])


def test_only_the_api_server_is_published_and_only_on_loopback(stack: dict[str, Service]) -> None:
    ports = {name: service.definition.get("ports", []) for name, service in stack.items()}
    published = {name: port for name, port in ports.items() if port}
    assert published == {"api-server": ["127.0.0.1:8080:8080"]}
    assert "network_mode" not in FILE.read_text(encoding="utf-8")


def test_the_example_names_every_variable_and_no_other() -> None:
    assert set(example()) == set(_variables_of(FILE.read_text(encoding="utf-8")))
    assert EXAMPLE.name not in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


@pytest.mark.skipif(importlib.util.find_spec("airflow") is None, reason="needs the extra `airflow`")
def test_every_command_and_option_is_one_of_the_pinned_airflow(
    airflow_services: list[Service], tmp_path: Path
) -> None:
    commands = [words for service in airflow_services for words in airflow_commands(service)]
    options = sorted(
        {
            tuple(name.removeprefix("AIRFLOW__").lower().split("__"))
            for service in airflow_services
            for name in service.environment
            if name.startswith("AIRFLOW__")
        }
    )
    free = [("celery_broker_transport_options", "visibility_timeout")]
    environment = {
        "PATH": os.environ["PATH"],
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__AUTH_MANAGER": airflow_services[0].environment[
            "AIRFLOW__CORE__AUTH_MANAGER"
        ],
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps({"commands": commands, "options": [o for o in options if o not in free]}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["unknown"] == []
    verbs = {words[0] for words in commands}
    assert verbs == {
        "db", "users", "pools", "api-server", "scheduler", "dag-processor", "triggerer", "celery",
        "jobs",
    }  # fmt: skip
    assert len(answer["parsed"]) == len(commands)


def test_every_variable_of_qsens_exists_in_the_code(airflow_services: list[Service]) -> None:
    files = [*(ROOT / "qsens").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = {
        name
        for service in airflow_services
        for name in service.environment
        if name.startswith("QSENS_")
    }
    assert named == {
        "QSENS_ROOT", "QSENS_RESULTS", "QSENS_PRESET", "QSENS_SCHEDULE", "QSENS_QUEUE",
        "QSENS_POOL", "QSENS_GPUS",
    }  # fmt: skip
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    named |= set(re.findall(r"\b(QSENS_\w+)=", dockerfile))
    assert [name for name in sorted(named) if f'"{name}"' not in code] == []


def test_every_path_on_this_side_exists_and_every_path_inside_is_used(
    airflow_services: list[Service],
) -> None:
    image = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    for service in airflow_services:
        inside = {}
        for volume in service.definition["volumes"]:
            source, target, *mode = volume.split(":")
            inside[target] = (source, mode)
            if source in ("./dags", "./plugins", "./configs"):
                assert (ROOT / source).is_dir()
        env = service.environment
        assert inside[env["AIRFLOW__CORE__DAGS_FOLDER"]] == ("./dags", ["ro"])
        assert inside[env["AIRFLOW__CORE__PLUGINS_FOLDER"]] == ("./plugins", ["ro"])
        assert inside[env["AIRFLOW__LOGGING__BASE_LOG_FOLDER"]] == ("logs", [])
        writes = service.name in ("init", "worker", "gpu-worker-0")
        assert inside[env["QSENS_RESULTS"]] == ("./results", [] if writes else ["ro"])
        # Where configs/ have a relative path, it starts at QSENS_ROOT.
        for name in ("configs", "models", "datasets"):
            assert inside[f"{env['QSENS_ROOT']}/{name}"] == (f"./{name}", ["ro"])
        assert f"QSENS_ROOT={env['QSENS_ROOT']}" in image
    (worker,) = [service for service in airflow_services if service.name == "gpu-worker-0"]
    assert worker.command[-4:] == ["--queues", "gpu", "--concurrency", "1"]
    assert worker.definition["profiles"] == ["gpu"]


def test_a_task_is_never_handed_out_again_while_it_may_run(
    airflow_services: list[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qsens.config import Roots, choices, load_sweep

    monkeypatch.setenv("QSENS_ROOT", str(ROOT))
    roots = Roots.from_environment()
    longest = max(
        load_sweep(preset, roots=roots).config.dag.execution_timeout_minutes * 60
        for preset in choices("sweep", roots)
    )
    name = "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT"
    for service in airflow_services:
        assert int(service.environment[name]) > longest


def test_the_context_holds_what_the_images_copy_and_no_secret() -> None:
    image = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = set()
    for line in image.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied.update(line.split()[1:-1])
    assert copied == allowed
    assert all((ROOT / path).exists() for path in allowed)
    assert ignore[1] == "*"

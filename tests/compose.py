"""The compose file as Compose reads it, for tests that check it and that run its topology."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker-compose.yaml"
EXAMPLE = ROOT / ".env.example"
_VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?P<rule>:-|:\?)?(?P<word>[^}]*)\}")


@dataclass(frozen=True)
class Service:
    """One service, resolved.

    Attributes:
        name: Its name.
        environment: Its environment.
        command: Words of its command; of its one shell script where it has one.
        definition: All of it.
    """

    name: str
    environment: dict[str, str]
    command: list[str]
    definition: dict[str, Any]


def example() -> dict[str, str]:
    """Return the variables of ``.env.example``."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def services(variables: Mapping[str, str]) -> dict[str, Service]:
    """Return every service, with ``${...}`` replaced.

    Raises:
        KeyError: A variable that the file demands is missing or empty.
    """
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"]
    return {name: _service(name, _resolve(body, variables)) for name, body in content.items()}


def variables_of(text: str) -> dict[str, set[str]]:
    """Return every ``${NAME...}`` of a text with the rules it is used under."""
    found: dict[str, set[str]] = {}
    for match in _VARIABLE.finditer(text):
        if match["name"]:
            found.setdefault(match["name"], set()).add(match["rule"] or "")
    return found


def airflow_commands(service: Service) -> Iterator[list[str]]:
    """Yield the arguments of every ``airflow`` command that a service runs."""
    if service.definition.get("entrypoint"):
        (script,) = service.command
        variables = service.environment
        for line in script.replace("\\\n", " ").splitlines():
            # The last command of a line, which may get its input from another one.
            words = line.rpartition("| ")[2]
            if words.startswith("airflow "):
                yield shlex.split(re.sub(r"\$(\w+)", lambda name: variables[name[1]], words))[1:]
    else:
        yield service.command
    check = service.definition.get("healthcheck", {}).get("test", [""])[-1]
    if check.startswith("airflow "):
        yield shlex.split(check)[1:]


def _service(name: str, body: dict[str, Any]) -> Service:
    command = body.get("command", [])
    return Service(
        name=name,
        environment={key: str(value) for key, value in body.get("environment", {}).items()},
        command=shlex.split(command) if isinstance(command, str) else list(command),
        definition=body,
    )


def _resolve(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, variables) for item in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: _one(match, variables), value)
    return value


def _one(match: re.Match[str], variables: Mapping[str, str]) -> str:
    if match[0] == "$$":
        return "$"
    given = variables.get(match["name"], "")
    if not given and match["rule"] == ":?":
        raise KeyError(match["word"])
    return given or (match["word"] if match["rule"] == ":-" else "")

"""What comes from elsewhere says nothing to a terminal."""

from __future__ import annotations

import copy
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qsens.cli.base import Terminal
from qsens.errors import UserError
from qsens.visible import LINES, visible, visible_json
from tests.schema.test_manifest import NAME, OLDER, ROW

# A screen cleared, a title set, a line ended, writing turned round, C1 controls, half a character.
FOREIGN = "a\x1b[2J\x1b]0;t\x07\r\nerror: b\u202ec\x9b31m\x7f\ud800[/x] [red]:smile:"
SHOWN = "a\\x1b[2J\\x1b]0;t\\x07\\r\\nerror: b\\u202ec\\x9b31m\\x7f\\ud800[/x] [red]:smile:"
WHOLE = FOREIGN.replace("\ud800", "")
HOSTILE = set("\x1b\x07\r\x7f\x9b\u202e\ud800")


def test_what_does_not_print_is_escaped() -> None:
    assert visible(FOREIGN) == SHOWN
    assert visible("模型 é – ✓ 7") == "模型 é – ✓ 7"
    assert visible("a\n\tb\x1b", LINES) == "a\n\tb\\x1b"


def test_json_means_the_same() -> None:
    value = {FOREIGN: ["\x85\u2028", "模型", "\U0001f600\U000e0001"]}
    text = visible_json(json.dumps(value, ensure_ascii=False))
    assert text.isprintable()
    assert "模型" in text
    assert json.loads(text) == value


def test_an_error_is_two_lines_whatever_it_names() -> None:
    error = UserError(f"holds {FOREIGN}", where=FOREIGN, remedy=f"Mend {FOREIGN}.")
    assert str(error).splitlines() == [f"{SHOWN}: holds {SHOWN}", f"Mend {SHOWN}."]
    # A program gets the name itself.
    assert error.as_dict()["where"] == FOREIGN


@pytest.mark.parametrize("stderr", [False, True])
def test_messages_and_tables_show_text_as_it_is(
    stderr: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.table import Table

    table = Table(title=FOREIGN)
    table.add_column("name", overflow="fold", no_wrap=True)
    table.add_row("[/x]" + "\x1b[2J")
    console = Terminal(stderr=stderr)
    console.print(FOREIGN, style="red")
    console.print(table)
    said = "".join(capsys.readouterr())
    assert SHOWN in said
    assert "[/x]\\x1b[2J" in said
    assert not HOSTILE & {*said}


def ran(*words: str, terminal: bool = False) -> tuple[int, str]:
    """Run the command line; return its exit code and all that it says."""
    command = [sys.executable, "-m", "qsens", *words]
    if not terminal:
        done = subprocess.run(command, capture_output=True, check=False)
        return done.returncode, (done.stdout + done.stderr).decode()
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                chunk = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            said += chunk
    os.close(ours)
    return process.returncode, said.decode()


@pytest.fixture
def manifests(tmp_path: Path) -> list[str]:
    """Return two manifests whose names are foreign."""
    found = []
    for at, name in enumerate(("one", "other")):
        changed: dict[str, Any] = copy.deepcopy(OLDER)
        row = changed["layer_sensitivity"].pop(ROW)
        row["scores"][0] *= 1 + at
        # Half of a character is refused when it is read.
        changed["layer_sensitivity"][WHOLE] = row
        changed["model"]["id"] = f"{WHOLE}{name}"
        (tmp_path / name).mkdir()
        (tmp_path / name / NAME).write_text(json.dumps(changed))
        found.append(str(tmp_path / name))
    return found


def test_names_of_manifests_are_text_on_a_terminal(manifests: list[str]) -> None:
    code, said = ran("compare", *manifests, terminal=True)
    assert code == 0, said
    # Colours are the console's own: nothing that clears a screen or sets a title.
    for hostile in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\u202e", "\nerror: b"):
        assert hostile not in said
    code, said = ran("compare", *manifests, "--json")
    assert code == 0
    assert json.loads(said)["cells"][0]["groups"][0]["layer"] == WHOLE
    assert not HOSTILE & {*said}


def test_messages_about_foreign_names_are_one_message(tmp_path: Path) -> None:
    changed = copy.deepcopy(OLDER)
    changed["layer_sensitivity"][WHOLE] = {}
    (tmp_path / NAME).write_text(json.dumps(changed))
    code, said = ran("report", str(tmp_path))
    assert code == 2
    assert len(said.splitlines()) == 2
    assert not HOSTILE & {*said}


def test_logs_warnings_and_tracebacks_are_text_too() -> None:
    script = (
        "import logging, sys, warnings\n"
        "from qsens import cli\n"
        "name = 'a\\x1b[2J\\x9b'\n"
        "def app(**_):\n"
        "    logging.getLogger('x').warning('%s', name)\n"
        "    warnings.warn(name)\n"
        "    raise RuntimeError(name)\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    said = done.stderr.decode()
    assert done.returncode == 1
    assert said.count("a\\x1b[2J\\x9b") >= 3
    assert "Traceback" in said
    assert not HOSTILE & {*said}

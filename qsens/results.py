"""A stored result: a manifest and the tensors beside it, in a directory named by their digest."""

from __future__ import annotations

from pathlib import Path

from qsens.checksums import digest_file, read_metadata
from qsens.errors import Damaged
from qsens.manifest import Manifest, read_manifest

MANIFEST = "manifest.json"
STATE = "state.safetensors"
_AGAIN = "Run its sweep again: what is damaged is computed again."


def read_result(directory: Path) -> Manifest:
    """Read the manifest of a stored result, and check that all of it is what was written there.

    Args:
        directory: The result; its name is the cell's digest.

    Raises:
        Damaged: It cannot be read, is not what was written, or is the result of another cell.
        UserError: A newer qsens wrote it.
    """
    manifest = read_manifest(directory / MANIFEST)
    if manifest.cell_digest != directory.name:
        raise Damaged(
            "is damaged: it is the result of another cell",
            where=str(directory / MANIFEST),
            remedy=_AGAIN,
        )
    check_state(manifest, directory / STATE)
    return manifest


def check_state(manifest: Manifest, state: Path) -> None:
    """Check that the tensors beside a manifest are those that were written with it.

    Of a result from before there were checksums, only that they are whole and those of its cell;
    there may be none.

    Raises:
        Damaged: They are not.
    """
    expected = manifest.state_digest
    try:
        if expected is not None:
            same = digest_file(state) == expected
        elif state.is_file():
            same = read_metadata(state).get("cell", manifest.cell) == manifest.cell
        else:
            return
    except OSError as error:
        raise Damaged(
            f"cannot be read: {error.strerror}", where=str(state), remedy=_AGAIN
        ) from error
    except ValueError as error:
        raise Damaged(f"is damaged: {error}", where=str(state), remedy=_AGAIN) from error
    if not same:
        raise Damaged(
            "is damaged: its content does not match the manifest beside it",
            where=str(state),
            remedy=_AGAIN,
        )

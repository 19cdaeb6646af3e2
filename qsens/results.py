"""A stored result: a manifest and the tensors beside it, in a directory named by their digest."""

from __future__ import annotations

from pathlib import Path

from qsens.checksums import digest_file, metadata_of
from qsens.errors import Damaged
from qsens.reading import has_file, read_bytes
from qsens.schema.manifest import Manifest, read_manifest

MANIFEST = "manifest.json"
STATE = "state.safetensors"
AGAIN = "Run its sweep again: what is damaged is computed again."


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
            remedy=AGAIN,
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
            same = digest_file(state, remedy=AGAIN, error=Damaged) == expected
        elif has_file(state, remedy=AGAIN, error=Damaged):
            known = metadata_of(read_bytes(state, remedy=AGAIN, error=Damaged))
            same = known.get("cell", manifest.cell) == manifest.cell
        else:
            return
    except ValueError as error:
        raise Damaged(f"is damaged: {error}", where=str(state), remedy=AGAIN) from error
    if not same:
        raise Damaged(
            "is damaged: its content does not match the manifest beside it",
            where=str(state),
            remedy=AGAIN,
        )

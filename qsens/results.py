"""A stored result: a manifest and the tensors beside it, in a directory named by their digest."""

from __future__ import annotations

from pathlib import Path

from qsens.checksums import digest_file, metadata_of
from qsens.documents import read_document
from qsens.errors import Damaged, UserError
from qsens.reading import has_directory, has_file, read_bytes
from qsens.schema.manifest import MANIFEST_SUFFIX, SCHEMA_VERSION, Manifest
from qsens.schema.older import complete, of_today

MANIFEST = "manifest.json"
STATE = "state.safetensors"
AGAIN = "Run its sweep again: what is damaged is computed again."


def read_manifest(path: Path) -> Manifest:
    """Read a manifest of this or of the older layout; older rows get status and bits.

    Raises:
        Damaged: The file is no manifest, or not as it was written.
        UserError: A newer qsens wrote it.
    """
    manifest = read_document(
        Manifest,
        path,
        what="manifest",
        version=SCHEMA_VERSION,
        name="Name a whole manifest.",
        again=f"Name a manifest that ends in {MANIFEST_SUFFIX}, or publish its sweep again.",
        prepare=of_today,
    )
    if manifest.schema_version > 0:
        return manifest
    rows = {
        key: complete(key, row, manifest.layers) for key, row in manifest.layer_sensitivity.items()
    }
    return manifest.model_copy(update={"layer_sensitivity": rows})


def find_manifest(directory: Path) -> Path:
    """Return the one manifest in ``directory``.

    Raises:
        UserError: There is none, or more than one.
    """
    name = f"Name a directory with one *{MANIFEST_SUFFIX}, or the file itself."
    if not has_directory(directory, remedy=name) and has_file(directory, remedy=name):
        return directory
    manifests = sorted(directory.glob(f"*{MANIFEST_SUFFIX}")) or sorted(directory.glob("*.json"))
    manifests = [
        path for path in manifests if not path.name.startswith(("per-layer-", "summary", "plan"))
    ]
    if len(manifests) == 1:
        return manifests[0]
    what = f"holds {len(manifests)} manifests" if manifests else "holds no manifest"
    raise UserError(
        what,
        where=str(directory),
        remedy=name,
    )


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

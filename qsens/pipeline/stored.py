"""Results as they are read again: what is stored under a digest, and what was published of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qsens.analysis.samples import SampleScores, read_samples
from qsens.errors import Damaged
from qsens.published import Shown
from qsens.results import MANIFEST, STATE, check_state, read_manifest, read_result
from qsens.schema.manifest import MANIFEST_SUFFIX, STATE_SUFFIX, Manifest


@dataclass(frozen=True)
class Result:
    """The result of one cell, checked.

    Attributes:
        manifest: Its manifest.
        samples: Scores of every sample, where its engine kept them.
    """

    manifest: Manifest
    samples: SampleScores | None

    @classmethod
    def read(cls, directory: Path) -> Result:
        """Read a result that is stored under its digest, the name of ``directory``.

        Raises:
            Damaged: It is not there, cannot be read, or is not what was written.
            UserError: A newer qsens wrote it.
        """
        return cls._of(read_result(directory), directory / STATE)

    @classmethod
    def at(cls, path: Path) -> Result:
        """Read a result by the path of its manifest, a published one or not.

        Raises:
            Damaged: It cannot be read, is not what was written, or is the result of another cell
                than the directory shows.
            UserError: A newer qsens wrote it.
        """
        if path.name == MANIFEST:
            return cls.read(path.parent)
        manifest = read_manifest(path)
        scheme = path.name.removesuffix(MANIFEST_SUFFIX)
        shown = Shown.read(path.parent)
        digest = shown.digest if shown is not None else None
        if manifest.verified and (
            scheme != manifest.scheme.name or digest not in (None, manifest.cell_digest)
        ):
            raise Damaged(
                f"is damaged: it is the result of another cell, {manifest.cell}",
                where=str(path),
                remedy="Publish its sweep again.",
            )
        state = path.with_name(scheme + STATE_SUFFIX)
        check_state(manifest, state)
        return cls._of(manifest, state)

    @classmethod
    def _of(cls, manifest: Manifest, state: Path) -> Result:
        method = manifest.scheme.auto_quantize_method
        return cls(manifest, read_samples(state, method) if state.is_file() else None)

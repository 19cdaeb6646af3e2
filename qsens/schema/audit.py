"""The schema of an audit: its file, and the block of it in manifests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from qsens.config.models import Coverage, Modality, Size
from qsens.documents import read_document, refuse_newer
from qsens.errors import Damaged
from qsens.names import Kind
from qsens.schema.section import Section

AUDIT_VERSION = 2
Verdict = Literal["trust", "rank only", "do not trust"]


class Point(Section):
    """One group of an audit: what the score says, and what is true."""

    layer: str
    """ModelOpt's name of the group."""
    kind: Kind
    """What the group is in a decoder layer."""
    estimate: float
    """Its score, in the audit's statistic; nats a token with ``fisher``, a proxy with
    ``gradient``."""
    standard_error: float | None
    """Of the estimate, from its draws; null where it has none."""
    truth: float
    """KL divergence of the model with this group quantized alone, nats a token."""


class Judgement(Section):
    """What a few true measurements say about a score."""

    verdict: Verdict
    """``trust``: the numbers; ``rank only``: their order; ``do not trust``: neither."""
    reason: str
    """Why, in words."""
    rho: float | None
    """Spearman's rank correlation of estimate and truth; null where one of them is constant."""
    ratio: float | None
    """Median of estimate over truth; null for a proxy, which has none."""
    ratio_10: float | None
    """Its 10 % quantile over the groups."""
    ratio_90: float | None
    """Its 90 % quantile over the groups."""
    covered: float | None
    """Share of drawn groups whose truth lies in the estimate's 90 % interval; null without."""


class Audit(Section):
    """A score against the true divergence of some groups; its file, and a block of manifests."""

    schema_version: int = AUDIT_VERSION
    """Version of this schema."""
    digest: str | None = None
    """SHA-256 over what was measured, on which scores; null in audits older than this key."""
    cell: str
    """Id of the cell that was audited."""
    pair: str
    """Precision pair; the verdict holds for it at every size."""
    granularity: str
    """Granularity."""
    coverage: Coverage = "lm_only"
    """Part of the model that may be quantized."""
    modality: Modality = "text"
    """What a sample is."""
    domain: str | None = None
    """The data set that was audited; null for all of the sweep's."""
    size: Size
    """Calibration size of that cell."""
    cell_digest: str
    """Digest of all that changes its scores."""
    method: str
    """The score that was audited."""
    mode: Literal["sample", "full"]
    """Whether some groups were measured or all."""
    samples: int
    """Samples that estimates and truths are over."""
    statistic: Literal["sensitivity", "sensitivity_per_token"] = "sensitivity_per_token"
    """Which score the estimates are: the one that places groups. Audits older than this key have
    the score per token, with ``gradient`` as well."""
    points: tuple[Point, ...]
    """The groups measured, most sensitive first."""
    judgement: Judgement
    """What they say."""
    failures: dict[str, str] = {}
    """Groups whose truth could not be measured, with the reason."""
    floor: float | None = None
    """KL divergence of the model in its own data type from itself in float32, nats a token: what
    rounding costs a whole model, no property of a format; null where it rounds nothing."""
    seconds: float
    """What the measurement took, for all pairs that were audited with this one."""
    device: str
    """The device, in words."""
    measured_kl: int = 1
    """Version of what measured the divergences; audits older than this key are of the first."""
    checksum: str | None = None
    """SHA-256 over the canonical JSON of all other keys; null in audits older than this key."""

    @field_validator("schema_version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        refuse_newer("audit", version, AUDIT_VERSION)
        return version


def read_audit(path: Path) -> Audit | None:
    """Read an audit; none where there is none, or it is not what was written.

    Raises:
        UserError: A newer qsens wrote it.
    """
    try:
        return read_document(
            Audit,
            path,
            what="audit",
            version=AUDIT_VERSION,
            name="Audit again with `qsens audit`.",
            again="Audit again with `qsens audit`.",
        )
    except Damaged:
        return None


def digest_of(audit: Audit) -> str:
    """Return the SHA-256 over what an audit measured, on which scores: not when, nor how fast."""
    measured: dict[str, Any] = audit.model_dump(
        mode="json", include={"cell_digest", "method", "samples", "points", "failures"}
    )
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()

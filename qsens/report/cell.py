"""The report of one cell, from its manifest and samples: Markdown, JSON and one HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qsens.analysis.experts import Mixture, mixtures
from qsens.analysis.ranking import Part, Totals, by_depth, by_kind, finite, rank
from qsens.analysis.samples import SampleScores
from qsens.analysis.stability import LEVEL, RESAMPLES, Spread, settled, spread
from qsens.config.base import Frozen
from qsens.documents import dump_json
from qsens.lenient import UNKNOWN
from qsens.names import Kind
from qsens.report import charts
from qsens.report import format as look
from qsens.report.assets import embedded, linked, page_data
from qsens.report.prose import samples_words
from qsens.report.render import render_html, render_markdown
from qsens.report.svg import depth_svg
from qsens.schema.audit import Audit
from qsens.schema.manifest import Dataset, Manifest, Model, Quantization, Scheme, Versions
from qsens.schema.section import Section
from qsens.schema.summary import CellStability, Row, Statistic
from qsens.store import ASSETS
from qsens.writing import write_text

REPORT_VERSION = 1
BASENAME = "per-layer-sensitivity"
PROTECTED = 5
_ROWS_IN_PAGE = 300


class Search(Frozen):
    """The outcome of ModelOpt's search at the target of effective bits."""

    effective_bits_target: float | None
    """Target, in bits a weight."""
    effective_bits_reached: float | None
    """What the search reached, in bits a weight."""
    score: float | None
    """Sum of the scores of the groups that the search quantized."""
    constraint_met: bool | None
    """Whether the target was met."""


class CellReport(Frozen):
    """``per-layer-sensitivity.json``: the report of one cell, nothing rounded.

    Sections that a manifest of the older layout lacks are left out of the file.
    """

    schema_version: int = REPORT_VERSION
    """Version of this schema."""
    cell: str | None
    """Cell id, ``wfp8_afp8-small``."""
    cell_digest: str | None
    """Digest of all that changes the numbers."""
    engine: str | None
    """What computed the scores."""
    created: str | None
    """When the scores were computed, ISO 8601, UTC."""
    scheme: Scheme
    """What was asked for."""
    model: Model
    """The checkpoint."""
    dataset: Dataset | None
    """The calibration samples."""
    quantization: Quantization | None
    """The format."""
    versions: Versions | None
    """What computed it."""
    partial: tuple[str, ...]
    """Why the result is partial; empty when it is whole."""
    notices: tuple[str, ...]
    """What a reader should know."""
    search: Search
    """The outcome of the search."""
    totals: Totals
    """Sums over the rows."""
    by_kind: dict[Kind, Part]
    """Sums over the scored rows of each kind of module, largest first."""
    by_depth: dict[int, Part]
    """Sums over the scored rows of each layer, by its index."""
    stability: CellStability | None = None
    """How sure the ranking is; none without scores of every sample."""
    audit: Audit | None = None
    """The scores of its pair against the true divergence of some groups; none without an audit."""
    floor: float | None = None
    """What rounding activations costs the unquantized model, nats a token, where its divergence was
    measured; no property of a format."""
    mixtures: tuple[Mixture, ...] = ()
    """The experts of each mixture, in model order; empty where there are none."""
    rows: tuple[Row, ...]
    """Scored groups, most sensitive first; then the others, by status and name."""

    @property
    def title(self) -> str:
        """Return the cell's id, or the scheme's name in the older layout."""
        return self.cell or self.scheme.name

    @property
    def model_name(self) -> str:
        """Return the model's name, or the last component of its path in the older layout."""
        return self.model.name or checkpoint_name(self.model.id)

    @property
    def experimental(self) -> bool:
        """Return whether nobody is known to deploy the pair."""
        return self.quantization is not None and bool(self.quantization.experimental)

    @property
    def formats(self) -> str:
        """Return the names of the formats searched."""
        return ", ".join(self.scheme.quant_formats) or UNKNOWN

    @property
    def ranked(self) -> tuple[Row, ...]:
        """Return the scored rows, most sensitive first."""
        return tuple(row for row in self.rows if row.position is not None)

    @property
    def unranked(self) -> tuple[Row, ...]:
        """Return the rows without a score."""
        return tuple(row for row in self.rows if row.position is None)

    @property
    def broken(self) -> int:
        """Return how many groups should have a score and have none."""
        statuses = self.totals.statuses
        return statuses.get("failed", 0) + statuses.get("non_finite", 0)


def write_cell(
    report: CellReport,
    directory: Path,
    *,
    assets: Path | None = None,
    single_file: bool = False,
) -> list[Path]:
    """Write the reports of a cell; equal reports give equal bytes.

    Args:
        report: What there is to say, see :func:`build_cell`.
        directory: Where the reports go.
        assets: Directory of the scripts that pages share; one in ``directory`` when not given.
        single_file: Whether the page holds its scripts, instead of sharing them.

    Returns:
        The Markdown, JSON and HTML file, and the chart of the Markdown where there is one.
    """
    depths = charts.depth_map(report.ranked)
    picture = depth_svg(depths)
    context: dict[str, Any] = {
        "report": report,
        "method": report.scheme.auto_quantize_method,
        "facts": facts(report),
        "kinds": report.by_kind,
        "protected": report.ranked[:PROTECTED],
        "protected_share": math.fsum(row.share or 0.0 for row in report.ranked[:PROTECTED]),
        "per_token": any(row.sensitivity_per_token is not None for row in report.rows),
        "picture": f"{BASENAME}.svg" if picture else None,
    }
    scores = [row.sensitivity for row in report.ranked if row.sensitivity]
    statistic = report.stability.statistic if report.stability else "sensitivity"
    drawn = {
        "profile": charts.profile(report.ranked),
        "first": charts.first_groups(report.ranked, statistic),
        "audit": charts.audited(report.audit),
    }
    pages = {
        ".md": render_markdown("cell.md", **context),
        ".json": dump_json(_as_json(report)),
        ".html": render_html(
            "cell.html",
            **context,
            low=min(scores, default=0.0),
            high=max(scores, default=0.0),
            depth_map=depths,
            rows_in_page=_ROWS_IN_PAGE,
            drawn=drawn,
            scripts=embedded() if single_file else linked(directory, assets or directory / ASSETS),
            data=page_data(
                {
                    "charts": {name: chart for name, chart in drawn.items() if chart},
                    "tables": {"groups": _rest(report, per_token=context["per_token"])},
                }
            ),
        ),
    } | ({".svg": picture} if picture else {})
    paths = [directory / f"{BASENAME}{suffix}" for suffix in pages]
    for path, text in zip(paths, pages.values(), strict=True):
        write_text(path, text)
    return paths


def build_cell(manifest: Manifest, samples: SampleScores | None = None) -> CellReport:
    """Return the report of a cell.

    Args:
        manifest: A manifest as ``read_manifest`` returns it.
        samples: Scores of every sample, where there are any: they say how sure the ranking is.
    """
    ranking, spreads = rank(manifest), {}
    if samples is not None:
        batch_size = manifest.scheme.auto_quantize_batch_size
        spreads = spread(samples, ranking.stated, ranking.statistic, batch_size)
        ranking = rank(manifest, spreads)
    state = manifest.autoquant_state
    return CellReport(
        cell=manifest.cell,
        cell_digest=manifest.cell_digest,
        engine=manifest.engine,
        created=manifest.created,
        scheme=manifest.scheme,
        model=manifest.model,
        dataset=manifest.dataset,
        quantization=manifest.quantization,
        versions=manifest.versions,
        partial=tuple(manifest.partial),
        notices=tuple(manifest.notices),
        search=Search(
            effective_bits_target=finite(manifest.scheme.auto_quantize_bits),
            effective_bits_reached=finite(state.constraints.get("effective_bits")),
            score=finite(state.score),
            constraint_met=state.is_satisfied,
        ),
        totals=ranking.totals,
        by_kind=by_kind(ranking.rows),
        by_depth=by_depth(ranking.rows),
        stability=_stability(ranking.statistic, samples.count, spreads)
        if samples is not None and spreads
        else None,
        audit=manifest.audit,
        floor=manifest.audit.floor if manifest.audit else manifest.floor,
        mixtures=mixtures(manifest),
        rows=ranking.rows,
    )


def facts(report: CellReport) -> list[tuple[str, str]]:
    """Return label and value of all that the header states; absent sections are left out."""
    scheme, model, search = report.scheme, report.model, report.search
    known: list[tuple[str, str | None]] = [
        ("Scheme", look.shown(scheme.name)),
        ("Formats", report.formats),
        ("Model", look.shown(report.model_name)),
        ("Checkpoint", _with_digest(checkpoint_name(model.id), model.digest)),
    ]
    if report.quantization is not None:
        pair, granularity = report.quantization.pair, report.quantization.granularity
        known.insert(1, ("Pair", f"{pair}, granularity {granularity}"))
    if (dataset := report.dataset) is not None:
        samples = (
            f"{look.known(dataset.samples_asked)} asked, {look.known(dataset.samples_used)} used, "
            f"{look.known(dataset.samples_scored)} scored"
        )
        if dataset.skipped:
            what = "picture" if dataset.modality == "image_text" else "record"
            samples += f", {look.count(dataset.skipped, what)} skipped"
        known += [
            ("Dataset", f"{look.shown(dataset.name)}, {dataset.size}"),
            ("Read as", samples_words(dataset.modality)),
            ("Samples", samples),
            (
                "Tokens",
                f"{look.known(dataset.tokens)}, of which {look.known(dataset.label_tokens)} scored "
                "as labels",
            ),
        ]
    else:
        known.append(("Samples scored at most", look.known(scheme.auto_quantize_score_size)))
    reached = search.effective_bits_reached
    target = f"target {look.known(search.effective_bits_target, look.bits)}"
    known += [
        (
            "Coverage",
            f"{scheme.coverage_mode}, {look.known(scheme.coverage_fraction, look.percent)}",
        ),
        (
            "Effective bits",
            target if reached is None else f"{target}, reached {look.bits(reached)}",
        ),
        ("Constraint met", _known(search.constraint_met, look.yes_no)),
        ("Total sensitivity", look.scientific(report.totals.sensitivity)),
        ("Total per token", _known(report.totals.sensitivity_per_token, look.scientific)),
        ("Score of the groups quantized", _known(search.score, look.scientific)),
        ("Engine", report.engine),
    ]
    if report.audit is not None:
        known.append(("Audit", audit_words(report.audit)))
    if (floor := report.floor) is not None:
        known.append(("Rounding activations alone", f"{look.scientific(floor)} nats a token"))
    if (versions := report.versions) is not None:
        stated = f"qsens {versions.qsens}, torch {versions.torch}"
        stated += f", transformers {versions.transformers}"
        stated += f", modelopt {versions.modelopt}" if versions.modelopt else ""
        known += [("Versions", stated), ("Device", versions.device)]
    known.append(("Created", report.created))
    return [(label, value) for label, value in known if value is not None]


def _stability(statistic: Statistic, samples: int, spreads: Mapping[str, Spread]) -> CellStability:
    first = settled(spreads, PROTECTED)
    stable = sum(spread.verdict == "stable" for spread in spreads.values())
    return CellStability(
        statistic=statistic,
        samples=samples,
        resamples=RESAMPLES,
        level=LEVEL,
        stable=stable,
        undecided=len(spreads) - stable,
        first=PROTECTED,
        first_stable=first.stable,
        samples_needed=first.samples_needed,
    )


def _rest(report: CellReport, *, per_token: bool) -> list[list[Any]]:
    """Return the rows that the page does not hold as elements, column by column as there."""
    sure = report.stability is not None
    return [
        [
            row.position,
            look.shown(row.layer) + look.companions(row),
            row.kind,
            row.num_bits,
            row.sensitivity,
            *([row.sensitivity_per_token] if per_token else []),
            *([row.interval] if sure else []),
            row.share,
            *([row.positions] if sure else []),
            row.size_cost,
            row.verdict or row.status,
        ]
        for row in report.rows[_ROWS_IN_PAGE:]
    ]


def audit_words(audit: Audit) -> str:
    """Return in words how far the scores of a pair can be trusted."""
    judgement = audit.judgement
    groups = look.count(audit.points, "group")
    return f"{judgement.verdict}: {judgement.reason} (true KL divergence of {groups}, {audit.cell})"


def checkpoint_name(path: str) -> str:
    """Return the last component of a checkpoint's path, of whichever system."""
    return PurePosixPath(path.replace("\\", "/")).name or path


def _as_json(report: CellReport) -> Any:
    """Return the report as JSON data; absent sections and their absent keys are left out."""
    data: dict[str, Any] = {}
    for name in CellReport.model_fields:
        value = getattr(report, name)
        if isinstance(value, Frozen | Audit):
            data[name] = value.model_dump()
        elif isinstance(value, Section):
            data[name] = value.model_dump(exclude_none=True)
        elif name == "rows":
            # What only the samples can tell is left out where they are not there.
            unknown = {"interval", "positions", "verdict", "samples_needed"}
            hidden = unknown if report.stability is None else set()
            data[name] = [row.model_dump(exclude=hidden) for row in report.rows]
        elif name == "mixtures":
            if value:
                data[name] = [mixture.model_dump() for mixture in value]
        elif name.startswith("by_"):
            data[name] = {str(key): part.model_dump() for key, part in value.items()}
        elif value is not None:
            data[name] = value
    return look.plain(data)


def _with_digest(name: str, digest: str | None) -> str:
    return f"{look.shown(name)}, {digest[:12]}" if digest else look.shown(name)


def _known(value: Any, show: Callable[[Any], str]) -> str | None:
    return None if value is None else show(value)

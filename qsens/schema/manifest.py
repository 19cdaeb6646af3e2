"""The schema of results: one manifest a cell, versioned, a comment on every key.

Keys that older tools read (``scheme``, ``model.id``, ``layers``, ``autoquant_state``,
``layer_sensitivity``, ``sensitivity_ranking``) keep their names and meaning; what is newer is
optional here. Of the older layout only ``layer_sensitivity`` is required: whatever else is missing
there is unknown.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qsens.names import Kind
from qsens.schema.audit import Audit
from qsens.schema.section import Section

SCHEMA_VERSION = 2
MANIFEST_SUFFIX = "_quant_manifest.json"
STATE_SUFFIX = "_autoquant_state.safetensors"

Status = Literal["scored", "disabled", "no_gradient", "non_finite", "failed"]


class Scheme(Section):
    """What was asked for."""

    name: str
    """Name of the scheme, ``wfp8_afp8_autoquant_lm``."""
    auto_quantize_bits: float | None
    """Target of the search, in bits a weight."""
    auto_quantize_method: str
    """The score: ``gradient``."""
    auto_quantize_score_size: int | None
    """Samples scored at most."""
    auto_quantize_batch_size: int | None = None
    """Samples of a nominal batch, consecutive ones in file order: ``T_b`` counts the label tokens
    of one. Null in results older than this key."""
    coverage_mode: str
    """Part of the model that may be quantized: ``lm_only``, ``all_layers``."""
    coverage_fraction: float | None
    """Share of the covered groups that took part, 0 to 1."""
    quant_formats: list[str]
    """Names of the formats searched, one here."""


class Model(Section):
    """The checkpoint."""

    id: str
    """Path of the checkpoint when it was scored."""
    name: str | None = None
    """Directory of the model's results under ``models/``."""
    short_name: str | None = None
    """Short name, used by older run directories."""
    digest: str | None = None
    """SHA-256 over the contents of its configuration and weight files."""
    architecture: str | None = None
    """Class that loads it, from its ``config.json``."""
    dtype: str | None = None
    """Data type that the weights were loaded in."""


class Dataset(Section):
    """The calibration samples."""

    name: str
    """Name of the data set."""
    path: str
    """File that the samples were read from."""
    digest: str
    """SHA-256 of that file."""
    modality: str
    """What a sample is: ``text``, a caption alone; ``image_text``, a picture and its caption."""
    size: str
    """Calibration size: ``small``, ``medium``, ``large``."""
    samples_asked: int | None
    """Samples that the size asks for."""
    samples_used: int | None
    """Samples that calibration used."""
    samples_scored: int | None
    """Samples that the score used."""
    tokens: int | None
    """Real tokens of the samples used."""
    label_tokens: int | None
    """Label tokens of the samples scored: real tokens predicted from real tokens."""
    padding_share: float | None
    """Padded tokens over all tokens that went through the model, 0 to 1; none enters a number."""
    truncated: int | None
    """Samples cut at ``calib_seq_len`` tokens."""
    calib_seq_len: int | None
    """Longest sample, in tokens."""
    records: str | None = None
    """What the file's records are: ``caption``, ``text``, ``messages``, ``sharegpt``,
    ``completion``; null in older manifests."""
    loss: str | None = None
    """Which tokens of conversations are labels: ``assistant`` or ``all``; null for others."""
    turns: str | None = None
    """``each`` where each answer of a conversation is a sample; null otherwise."""
    pictures_digest: str | None = None
    """SHA-256 over the contents of the pictures; null for ``text``."""
    skipped: int = 0
    """Samples left out because of their pictures, or since their records do not fit."""
    patches: int | None = None
    """Patches of the pictures of the samples used, as the vision tower reads them."""
    max_pixels: int | None = None
    """Pixels of a picture at most; null for ``text``."""
    prompt: str | None = None
    """What the user says beside a picture; null for ``text``."""
    domains: list[Dataset] = []
    """Where several data sets were scored together: each of them; empty otherwise."""


class Quantization(Section):
    """The format."""

    pair: str
    """Name of the precision pair, ``wfp8_afp8``."""
    granularity: str
    """Name of the granularity."""
    experimental: bool | None
    """Whether nobody is known to deploy the pair."""
    effective_bits: float | None
    """Bits a weight costs in this format, block scales included."""
    modelopt_config: dict[str, Any]
    """The ModelOpt configuration in full."""


class Versions(Section):
    """What computed it."""

    qsens: str
    """Version of qsens."""
    torch: str
    """Version of torch."""
    transformers: str
    """Version of transformers."""
    modelopt: str | None
    """Version of nvidia-modelopt, where it computed anything."""
    device: str
    """The device, in words: ``cpu`` or the card's name."""


class Layer(Section):
    """One module that can be quantized."""

    quantized: bool | None
    """Whether the search chose to quantize it, at the target of effective bits."""
    module_type: str
    """Its class under ModelOpt."""


class AutoquantState(Section):
    """The search's outcome at the target of effective bits."""

    keys: list[str] = []
    """Keys of the state that the search kept."""
    constraints: dict[str, float] = {}
    """Effective bits reached."""
    score: float | None = None
    """Sum of the scores of the groups that the search quantized."""
    is_satisfied: bool | None = None
    """Whether the target was met."""


class Experts(Section):
    """The experts of a mixture, by number from 0, each as if it alone were quantized."""

    sensitivity: list[float | None]
    """The row's score with that expert alone quantized, to six digits; null where it got no token
    or where the score is no finite number."""
    tokens: list[int]
    """Real tokens of the samples scored that the expert got."""
    without_tokens: list[int]
    """Experts that got none: nothing is known of them."""


class GroupSensitivity(Section):
    """Modules that share one format, and how much the format hurts them."""

    formats: list[str] = Field(min_length=1)
    """Format names with their effective bits; the last is no quantization."""
    scores: list[float | None] = Field(min_length=1)
    """Raw score of each format; none where it is not a finite number or was not computed."""
    costs: list[float] | None = Field(min_length=1)
    """ModelOpt's size of the group in each format, in 16-bit words."""
    importance: float | None
    """The score of the format searched."""
    rank: int | None
    """ModelOpt's rank: 1 is the *least* sensitive. Disabled groups come first, as there: their one
    format is no quantization, with a score of 0. Null where the score is not known (``failed``,
    ``non_finite``, ``no_gradient``)."""
    members: list[str] | None = None
    """Names of the modules in the group."""
    kind: Kind | None = None
    """What the group is in a decoder layer."""
    depth: int | None = None
    """Index of its layer, from 0."""
    status: Status | None = None
    """``scored``, ``disabled``, ``no_gradient``, ``non_finite``, ``failed``; a 0 is measured."""
    reason: str | None = None
    """Why it is not scored, where it is not."""
    num_bits: float | None = None
    """Effective bits of the format, block scales included."""
    sensitivity: float | None = None
    """``gradient``: ``sum_i s_i / T_b(i)^2``, ModelOpt's number; ``fisher`` and ``kl_div``: nats,
    summed."""
    sensitivity_per_token: float | None = None
    """``gradient``: ``sum_i s_i / sum_i T_i``; ``fisher`` and ``kl_div``: nats a real token."""
    standard_error: float | None = None
    """Of ``sensitivity_per_token``, from the draws of ``fisher`` alone; null for other methods."""
    relative_error: float | None = None
    """``||dY||^2 / ||Y||^2`` of the group's outputs over the real tokens scored."""
    size_cost: float | None = None
    """Weight elements x effective bits / 16: the group's size in 16-bit words."""
    experts: Experts | None = None
    """Of a mixture: its experts apart; null for other groups, and where they were not measured."""
    by_domain: dict[str, float] | None = None
    """Where several data sets were scored together: ``sensitivity_per_token`` over the samples of
    each, by its name, under the amax of all; null otherwise, and where the group is not scored."""


class RankedGroup(Section):
    """One line of the ranking."""

    name: str
    """Group name, with ModelOpt's suffix ``.quant_recipe``."""
    importance: float | None
    """The score of the format searched."""


class Manifest(Section):
    """The machine-readable result of one cell."""

    schema_version: int = 0
    """Version of this schema; 0 is the older layout."""
    cell: str | None = None
    """Cell id, ``wfp8_afp8-small``."""
    cell_digest: str | None = None
    """Digest of all that changes the numbers."""
    engine: str | None = None
    """What computed the scores: ``modelopt``."""
    created: str | None = None
    """When the scores were computed, ISO 8601, UTC."""
    scheme: Scheme
    """What was asked for."""
    model: Model
    """The checkpoint."""
    dataset: Dataset | None = None
    """The calibration samples."""
    quantization: Quantization | None = None
    """The format."""
    versions: Versions | None = None
    """What computed it."""
    partial: list[str] = []
    """Why this result is partial; empty when it is whole."""
    notices: list[str] = []
    """What a reader should know: experimental pairs, fallbacks."""
    timings: dict[str, float] = {}
    """Seconds by phase: ``load``, ``calibrate``, ``score``; of the whole pass."""
    memory: dict[str, float] = {}
    """GiB above the weights in that pass: ``predicted`` and ``peak``."""
    num_quantized_layers: int | None
    """Modules that can be quantized, covered or not."""
    layers: dict[str, Layer]
    """Those modules, by name."""
    autoquant_state: AutoquantState
    """The search's outcome."""
    layer_sensitivity: dict[str, GroupSensitivity] = Field(min_length=1)
    """Groups by ModelOpt's name, with the suffix ``.quant_recipe``."""
    sensitivity_ranking: list[RankedGroup]
    """The groups with a rank, least sensitive first."""
    floor: float | None = None
    """``kl_div``: KL divergence of the model in its own data type from itself in float32, nats a
    token; null where it rounds nothing, and for other methods."""
    audit: Audit | None = None
    """How far the scores can be trusted; publishing adds it, once the pair has been audited."""
    state_digest: str | None = None
    """SHA-256 over the bytes of the state file beside it; null in results older than this key."""
    checksum: str | None = None
    """SHA-256 over the canonical JSON of all other keys; null in results older than this key."""

    @property
    def verified(self) -> bool:
        """Return whether reading has found its content to be what was written."""
        return self.checksum is not None

from __future__ import annotations

from pathlib import Path

import pytest

from qsens.analysis.provenance import differences, inputs, settings
from qsens.config import load_sweep
from qsens.results import read_manifest
from qsens.schema.summary import Difference

REFERENCE = Path(__file__).parents[3] / "shared" / "reference-manifests"


def test_differences_are_sorted_by_cause() -> None:
    before = {("versions", "torch"): "2.10", ("checkpoint", "digest"): "a", ("captions", "n"): "1"}
    after = {("versions", "torch"): "2.11", ("checkpoint", "digest"): "b", ("captions", "n"): "1"}
    after[("configuration", "seed")] = "1"
    assert differences(before, after) == (  # type: ignore[arg-type]
        Difference(cause="checkpoint", what="digest", before="a", after="b"),
        Difference(cause="versions", what="torch", before="2.10", after="2.11"),
        Difference(cause="configuration", what="seed", before=None, after="1"),
    )
    assert differences(before, before) == ()  # type: ignore[arg-type]


def test_settings_that_change_numbers_are_named() -> None:
    one = settings(load_sweep("demo-text").config.model_dump(mode="json"))
    other = load_sweep("demo-text", ["autoquant.batch_size=3", "autoquant.device=cpu"]).config
    (found,) = differences(one, settings(other.model_dump(mode="json")))
    assert (found.cause, found.what, found.after) == ("configuration", "autoquant.batch_size", "3")


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published manifests are not here")
def test_two_published_manifests_name_what_differs() -> None:
    def read(name: str) -> dict[tuple[str, str], str]:
        return dict(inputs(read_manifest(REFERENCE / f"qwen3_vl_4b-{name}.json")))

    found = differences(read("wfp8_afp8-lm-medium"), read("wint8_afp16-lm-medium"))  # type: ignore[arg-type]
    assert {entry.what for entry in found} >= {"formats"}
    formats = next(entry for entry in found if entry.what == "formats")
    assert (formats.before, formats.after) != (None, None)
    sizes = [f"wint8_aint8-lm-{size}" for size in ("medium", "large")]
    assert differences(*(read(size) for size in sizes)) == ()  # type: ignore[arg-type]

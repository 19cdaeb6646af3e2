"""What is stored is checked: no bit that flips, and no file that is swapped, is published."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from qsens.checksums import digest_file
from qsens.config import Roots
from qsens.documents import dump_document
from qsens.errors import Damaged, Fault, OutOfMemory, QsensError, TryAgain, UserError
from qsens.grid import Plan, read_plan
from qsens.pipeline import compute, loading
from qsens.pipeline.audit import audit, find_audits, is_audited
from qsens.pipeline.cell import calibrate, score
from qsens.pipeline.failures import failure_to_tell, keep_failure, tell
from qsens.pipeline.plan import plan_json, plan_sweep
from qsens.pipeline.publish import publish, report
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.stored import Result
from qsens.pipeline.sweep import run_sweep
from qsens.published import read_summary
from qsens.results import read_manifest
from qsens.store import Store
from tests.checkpoint import tiny_families
from tests.pipeline import results

REPO = Path(__file__).resolve().parents[2]
FLIPS = 40


def flipped(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def same(one: bytes, other: bytes) -> bool:
    """Return whether two texts are the same JSON: a flip may change the case of an exponent."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def total(manifest: Any) -> float:
    return sum(row.sensitivity_per_token or 0.0 for row in manifest.layer_sensitivity.values())


@pytest.fixture
def whole(tmp_path: Path) -> Plan:
    return results.whole(results.plan(tmp_path, day=1), seed=1)


@pytest.mark.parametrize("file", ["manifest", "state"])
def test_no_bit_that_flips_in_a_result_counts(file: str, whole: Plan) -> None:
    rng, store = random.Random(13), Store(whole)
    cell, other = whole.cells
    path: Path = getattr(store, file)(cell)
    written = path.read_bytes()
    for _ in range(FLIPS):
        flipped(path, rng)
        if not same(path.read_bytes(), written):
            assert not store.is_done(cell)
            with pytest.raises(Damaged):
                Result.read(store.result_dir(cell))
        path.write_bytes(written)
    assert store.is_done(cell)
    flipped(path, rng)
    found = publish(whole)
    assert [entry["cell"] for entry in found["missing"]] == [cell.cell]
    assert "its stored result" in found["missing"][0]["reason"]
    assert read_manifest(Path(found["cells"][1]["manifest"])).cell == other.cell


def many(root: Path) -> list[Plan]:
    return [
        results.whole(results.plan(root, day=day, checkpoint=name), seed=day)
        for day, name in ((1, "a"), (2, "b"), (3, "d"))
    ]


def test_no_file_of_another_cell_counts(tmp_path: Path) -> None:
    plans = many(tmp_path)
    places = [(Store(made), cell) for made in plans for cell in made.cells]
    swaps = [
        (one, other, files)
        for one, other in itertools.combinations(places, 2)
        for files in (["manifest"], ["state"], ["manifest", "state"])
    ]
    for (one, mine), (other, theirs), files in random.Random(13).sample(swaps, 20):
        for name in files:
            _swap(getattr(one, name)(mine), getattr(other, name)(theirs))
        assert not one.is_done(mine)
        assert not other.is_done(theirs)
        for name in files:
            _swap(getattr(one, name)(mine), getattr(other, name)(theirs))
        assert one.is_done(mine)


def _swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def test_damage_in_what_was_published_is_said_by_reports_and_recipes(
    whole: Plan, tmp_path: Path
) -> None:
    roots = Roots(**{field.name: tmp_path for field in dataclasses.fields(Roots)})
    rng, store = random.Random(13), Store(whole)
    publish(whole)
    cell = whole.cells[0]
    published = store.published(cell)
    for path, check in (
        (published["manifest"], lambda: report(store.cell_dir(cell))),
        (published["state"], lambda: report(store.cell_dir(cell))),
        (store.sweep_dir() / "summary.json", lambda: report(store.sweep_dir())),
        (
            store.sweep_dir() / "summary.json",
            lambda: write_recipe(str(store.sweep_dir()), bits=8, target="json", roots=roots),
        ),
        (
            store.sweep_dir() / "plan.json",
            lambda: write_recipe(str(store.sweep_dir()), bits=8, target="json", roots=roots),
        ),
    ):
        written = path.read_bytes()
        for _ in range(FLIPS):
            flipped(path, rng)
            if not same(path.read_bytes(), written):
                with pytest.raises(UserError) as caught:
                    check()
                assert str(path) in caught.value.where
            path.write_bytes(written)
        check()
    # The results of two sizes exchanged: each is whole.
    other = store.published(whole.cells[1])
    for name in published:
        _swap(published[name], other[name])
    with pytest.raises(Damaged, match="the result of another cell"):
        report(store.cell_dir(cell))


def test_a_published_audit_has_a_right_checksum(whole: Plan) -> None:
    publish(whole)
    path = Store(whole).published(whole.cells[0])["manifest"]
    assert read_manifest(path).verified


@pytest.mark.parametrize("kind", ["manifest", "audit", "summary", "plan", "block"])
def test_what_a_newer_version_wrote_is_refused(kind: str, whole: Plan, tmp_path: Path) -> None:
    store = Store(whole)
    publish(whole)
    if kind in ("manifest", "block"):
        path = store.published(whole.cells[0])["manifest"]
        read: Callable[[Path], Any] = read_manifest
    elif kind == "audit":
        from qsens.schema.audit import read_audit

        path, read = tmp_path / "audit.json", read_audit
        path.write_text('{"schema_version": 1}')
    elif kind == "summary":
        path, read = store.sweep_dir() / "summary.json", read_summary
    else:
        path, read = store.sweep_dir() / "plan.json", read_plan
    data = json.loads(path.read_text())
    if kind == "block":
        data["audit"] = {"schema_version": 99}
    else:
        data["schema_version"] = 99
    for text in (json.dumps(data), dump_document(data)):
        path.write_text(text)
        if kind == "block" and text == json.dumps(data):
            continue  # it does not match the manifest's checksum: damaged
        with pytest.raises(UserError, match="of schema version 99, and this qsens reads") as caught:
            read(path)
        assert not isinstance(caught.value, Damaged)
        assert caught.value.remedy.startswith("Upgrade qsens")


# Digest that the version before checksums gave to the first cell of `results.plan(day=1)`.
BEFORE = "613c28700a49fd562c340ab7b7063759fd8b574b825f890527ec35d0ebb3586d"


def test_a_result_of_the_version_before_is_found_and_marked_unverified(tmp_path: Path) -> None:
    made = results.plan(tmp_path, day=1)
    store, cell = Store(made), made.cells[0]
    assert cell.digest == BEFORE
    for each in made.cells:
        results.result(made, each, seed=1, verified=False)
    text = store.manifest(cell).read_text()
    assert '"checksum"' not in text
    assert '"schema_version": 1' in text
    assert store.is_done(cell)
    assert score(made, cell.cell)["computed"] is False
    found = publish(made)
    assert found["complete"] is True
    summary = read_summary(store.sweep_dir() / "summary.json")
    (notice,) = summary.notices
    assert notice.startswith("2 of 2 results were stored before results had checksums")
    for name in ("summary.md", "index.html"):
        assert "2 of 2 results were stored before" in (store.sweep_dir() / name).read_text()
    page = store.cell_dir(cell) / "per-layer-sensitivity.md"
    assert "checksum" not in page.read_text()
    assert report(store.cell_dir(cell))["notices"][0].startswith("1 of 1 results")
    # What was published is what was stored: nobody has made up a checksum.
    assert store.published(cell)["manifest"].read_text() == text
    # Torn, or that of another cell, it counts as not there all the same.
    _swap(store.manifest(cell), store.manifest(made.cells[1]))
    assert not store.is_done(cell)
    _swap(store.manifest(cell), store.manifest(made.cells[1]))
    _swap(store.state(cell), store.state(made.cells[1]))
    assert not store.is_done(cell)
    store.state(cell).write_bytes(store.state(cell).read_bytes()[:-1])
    assert not store.is_done(cell)


def test_a_plan_of_the_version_before_is_published(whole: Plan, tmp_path: Path) -> None:
    data = json.loads(plan_json(whole))
    for newer in ("checksum", "published", "patterns"):
        del data[newer]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data | {"schema_version": 1}))
    assert publish(read_plan(path))["complete"] is True


# From here on, real sweeps of a tiny checkpoint.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "tiny"
    return tiny_families.save(tiny_families.configuration("Llama", tied=False), directory)


@pytest.fixture
def plan(checkpoint: Path, tmp_path: Path) -> Callable[..., Plan]:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(tiny_families.CAPTIONS) + "\n")
    pairs = tmp_path / "configs" / "quant_pair"
    pairs.mkdir(parents=True)
    for name in ("one", "two", "three"):
        (pairs / f"w{name}_afp16.yaml").write_text(
            f"weight: {name}\nactivation: fp16\nformat: BROKEN\neffective_bits: 8\n"
            f"weight_quantizer: {{num_bits: [7, {len(name)}], axis: null}}\n"
        )

    def make(*words: str) -> Plan:
        given = (
            f"model.path={checkpoint}",
            "model.dtype=float32",
            f"dataset.directory={tmp_path}",
            "dataset.files.small=captions.txt",
            "dataset.sizes.small=4",
            "dataset.size=small",
            "autoquant.device=cpu",
        )
        roots = Roots(
            root=REPO,
            results=tmp_path / "results",
            configs=(tmp_path / "configs", REPO / "configs"),
        )
        return plan_sweep("demo-text", [*given, *words], roots=roots)

    return make


PAIRS = "quant_pair=wfp8_afp8,wint8_afp16,wint8_aint8"


def numbers(published: Any) -> dict[str, Any]:
    """Return the rows that were published, by cell."""
    found = {}
    for entry in published["cells"]:
        manifest = read_manifest(Path(entry["manifest"]))
        found[manifest.cell] = manifest.layer_sensitivity
    return found


@pytest.mark.parametrize("damage", ["torn", "flipped", "state", "swapped", "gone"])
def test_a_damaged_result_is_computed_again_and_said_once(
    damage: str, plan: Callable[..., Plan]
) -> None:
    first, errors = run_sweep(plan(PAIRS))
    assert errors == []
    made = plan(PAIRS)
    store, (one, other, third) = Store(made), made.cells
    manifest, state = store.manifest(one), store.state(one)
    if damage == "torn":
        manifest.write_bytes(manifest.read_bytes()[:-100])
    elif damage == "flipped":
        flipped(manifest, random.Random(5))
    elif damage == "state":
        flipped(state, random.Random(5))
    elif damage == "swapped":
        _swap(manifest, store.manifest(other))
    else:
        state.unlink()
    bad = [one, other] if damage == "swapped" else [one]
    kept = store.manifest(third).read_bytes()
    again, errors = run_sweep(made)
    assert errors == []
    assert again["complete"] is True
    assert numbers(again) == numbers(first)
    assert store.manifest(third).read_bytes() == kept
    summary = read_summary(store.sweep_dir() / "summary.json")
    assert summary.notices == tuple(
        f"the stored result of {cell.cell} was damaged: it was set aside and computed again"
        for cell in sorted(bad, key=lambda cell: cell.digest)
    )
    aside = made.results / ".damaged" / made.sweep_id
    assert sorted(path.name for path in aside.iterdir()) == sorted(
        f"cells-{cell.digest}" for cell in bad
    )
    # Said once: the next sweep finds nothing wrong, and says nothing.
    later = plan(PAIRS)
    run_sweep(later)
    assert read_summary(Store(later).sweep_dir() / "summary.json").notices == ()
    # Its reports are made again, byte for byte.
    before = {path.name: path.read_bytes() for path in store.sweep_dir().iterdir()}
    (store.sweep_dir() / "summary.json").unlink()
    publish(made)
    assert {path.name: path.read_bytes() for path in store.sweep_dir().iterdir()} == before


def test_damaged_maxima_are_calibrated_again(plan: Callable[..., Plan]) -> None:
    made = plan(PAIRS)
    store, cell = Store(made), made.cell("wfp8_afp8-small")
    assert calibrate(made, cell.cell)["computed"] is True
    digest = cell.calibration
    path = store.calibration(digest)
    written, expected = path.read_bytes(), load_file(path)
    rng = random.Random(13)
    for _ in range(FLIPS):
        flipped(path, rng)
        assert not store.is_calibrated(digest)
        path.write_bytes(written)
    # Whole, and those of another digest.
    other = store.calibration("0" * 64)
    other.write_bytes(written)
    assert not store.is_calibrated("0" * 64)
    flipped(path, rng)
    again = calibrate(made, cell.cell)
    assert again["computed"] is True
    assert {name: float(value) for name, value in load_file(path).items()} == {
        name: float(value) for name, value in expected.items()
    }
    assert calibrate(made, cell.cell)["computed"] is False
    run_sweep(made)
    summary = read_summary(store.sweep_dir() / "summary.json")
    (notice,) = summary.notices
    assert notice.startswith("the stored calibration was damaged")


def test_a_damaged_audit_is_made_again(plan: Callable[..., Plan]) -> None:
    made = plan("quant_pair=wint8_afp16", "autoquant.method=fisher", "autoquant.audit=sample")
    published, errors = run_sweep(made)
    assert errors == []
    store, cell = Store(made), made.cells[0]
    path = store.audit(cell)
    written = path.read_bytes()
    (expected,) = find_audits(store)
    assert read_manifest(Path(published["cells"][0]["manifest"])).verified
    rng = random.Random(13)
    for _ in range(FLIPS):
        flipped(path, rng)
        if not same(path.read_bytes(), written):
            assert find_audits(store) == []
            assert not is_audited(made)
        path.write_bytes(written)
    assert is_audited(made)
    # One that was measured another way counts as not there.
    old = json.loads(written)
    del old["measured_kl"], old["checksum"]
    path.write_text(json.dumps(old | {"schema_version": 1}))
    assert is_audited(made)  # in float32 that is the way of today
    path.write_text(dump_document(old | {"measured_kl": 2}))
    assert not is_audited(made)
    path.write_bytes(written)
    flipped(path, rng)
    (again,) = audit(made)["audits"]
    assert again["points"] == [point.model_dump() for point in expected.points]
    publish(made)
    summary = read_summary(store.sweep_dir() / "summary.json")
    assert summary.notices == (
        f"the stored audit of {cell.cell} was damaged: it was set aside and computed again",
    )


# Failing cells.

BROKEN = "quant_pair=wone_afp16,wint8_afp16,wtwo_afp16,wthree_afp16"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what grows by one whenever the checkpoint is loaded: a pass begins with it."""
    loads: list[str] = []
    load = loading.load_checkpoint

    def counted(plan: Plan, progress: Any) -> Any:
        loads.append(plan.sweep_id)
        return load(plan, progress)

    monkeypatch.setattr(loading, "load_checkpoint", counted)
    return loads


def test_a_sweep_and_its_audit_load_the_checkpoint_once(
    plan: Callable[..., Plan], passes: list[str]
) -> None:
    made = plan("quant_pair=wint8_afp16", "autoquant.method=fisher", "autoquant.audit=sample")
    published, errors = run_sweep(made)
    assert (errors, published["complete"]) == ([], True)
    assert len(find_audits(Store(made))) == 1
    assert len(passes) == 1


def test_failing_cells_cost_one_pass(plan: Callable[..., Plan], passes: list[str]) -> None:
    published, errors = run_sweep(plan(BROKEN))
    assert len(passes) == 1
    failing = {"wone_afp16-small", "wtwo_afp16-small", "wthree_afp16-small"}
    assert {error.where for error in errors} == failing
    assert {entry["cell"] for entry in published["missing"]} == failing
    # Another sweep tries again.
    run_sweep(plan(BROKEN))
    assert len(passes) == 2


def test_each_step_tells_once_and_then_computes_again(
    plan: Callable[..., Plan], passes: list[str]
) -> None:
    made = plan(BROKEN)
    ok, one, two = (made.cell(f"w{name}_afp16-small") for name in ("int8", "one", "two"))
    assert score(made, ok.cell)["computed"] is True
    assert len(passes) == 1
    for cell in (one, two):
        assert calibrate(made, cell.cell)["computed"] is False
        with pytest.raises(QsensError) as caught:
            score(made, cell.cell)
        assert caught.value.where == cell.cell
    assert len(passes) == 1
    # A retry computes, for the others as well.
    with pytest.raises(QsensError):
        score(made, one.cell)
    assert len(passes) == 2
    with pytest.raises(QsensError):
        score(made, two.cell)
    assert len(passes) == 2
    with pytest.raises(QsensError):
        score(made, two.cell)
    assert len(passes) == 3


def test_a_fault_that_passes_is_never_for_ever(
    plan: Callable[..., Plan], passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(PAIRS)
    with monkeypatch.context() as patch:
        patch.setattr(compute, "_score_set", lambda *_: (_ for _ in ()).throw(RuntimeError("x")))
        with pytest.raises(RuntimeError, match="x"):
            score(made, made.cells[0].cell)
    with pytest.raises(Exception, match="RuntimeError: x"):
        score(made, made.cells[1].cell)
    assert len(passes) == 1
    assert score(made, made.cells[1].cell)["computed"] is True
    assert score(made, made.cells[0].cell)["computed"] is False
    assert len(passes) == 2
    assert not list((made.results / ".cells").glob("*.failed.json"))


def test_a_failure_that_is_not_what_was_written_counts_as_not_there(
    plan: Callable[..., Plan], passes: list[str]
) -> None:
    made = plan(BROKEN)
    score(made, "wint8_afp16-small")
    cell = made.cell("wone_afp16-small")
    path = Store(made).failure(cell)
    path.write_text(path.read_text().replace("wone", "wtwo"))
    with pytest.raises(QsensError):
        score(made, cell.cell)
    assert len(passes) == 2


@pytest.mark.parametrize("kind", [UserError, OutOfMemory, Fault])
def test_a_failure_is_told_as_the_error_that_it_was(kind: type[QsensError], whole: Plan) -> None:
    store, (cell, other) = Store(whole), whole.cells
    error = kind("no such format", where=cell.cell, remedy="Mend it.")
    keep_failure(store, cell, error)
    with pytest.raises(kind) as caught:
        tell(store, cell)
    assert caught.value.as_dict() == error.as_dict()
    tell(store, cell)  # once
    # What may pass by itself is told of nobody else: each one tries.
    keep_failure(store, other, TryAgain("is being computed by another process"))
    tell(store, other)


def test_no_bit_that_flips_in_a_failure_is_told(whole: Plan) -> None:
    rng, store, cell = random.Random(13), Store(whole), whole.cells[0]
    path = store.failure(cell)
    keep_failure(store, cell, UserError("no such format", where=cell.cell, remedy="Mend it."))
    written = path.read_bytes()
    for _ in range(FLIPS):
        flipped(path, rng)
        if not same(path.read_bytes(), written):
            assert failure_to_tell(store, cell) is None
            assert not path.exists()
        path.write_bytes(written)
    assert failure_to_tell(store, cell) is not None


def test_a_step_that_is_told_takes_its_whole_lane_only_once(
    plan: Callable[..., Plan], passes: list[str]
) -> None:
    """In another order: the failing one comes first, as its own step computes."""
    made = plan(BROKEN)
    with pytest.raises(QsensError):
        score(made, "wone_afp16-small")
    for name in ("wtwo", "wthree"):
        with pytest.raises(QsensError):
            score(made, f"{name}_afp16-small")
    assert score(made, "wint8_afp16-small")["computed"] is False
    assert len(passes) == 1


def test_a_publish_hashes_each_state_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits are looked for with the manifests that were read already."""
    made = results.whole(results.plan(tmp_path, day=1), seed=1)
    hashed: Counter[Path] = Counter()

    def counted(path: Path, **words: Any) -> str:
        hashed[path] += 1
        return digest_file(path, **words)

    monkeypatch.setattr("qsens.results.digest_file", counted)
    publish(made)
    assert hashed == {Store(made).state(cell): 1 for cell in made.cells}

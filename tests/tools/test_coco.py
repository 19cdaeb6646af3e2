"""Calibration samples from COCO annotations that the tests make."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qsens import cli
from qsens.config import Roots
from qsens.data.captions import identify_samples
from qsens.errors import TryAgain, UserError
from qsens.tools.coco import make_captions, normalise

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """Roots with a data set of sizes 2, 4 and 8."""
    own = tmp_path / "own" / "dataset"
    own.mkdir(parents=True)
    (own / "few.yaml").write_text(
        "name: few\ndirectory: samples\n"
        "files: {small: few_small.txt, medium: few_medium.txt, large: few_large.txt}\n"
        "sizes: {small: 2, medium: 4, large: 8}\n"
    )
    return Roots(root=tmp_path, results=tmp_path, configs=(own.parent, REPO / "configs"))


def coco(count: int = 12) -> dict[str, Any]:
    """Return annotations of ``count`` images with three captions each."""
    return {
        "info": {"year": 2017},
        "images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(count)],
        "annotations": [
            {"image_id": n, "id": 100 * n + k, "caption": f"Image {n}, told for the {k}. time."}
            for n in range(count)
            for k in range(3)
        ],
    }


def written(tmp_path: Path, tree: Any) -> Path:
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps(tree))
    return path


def lines(tmp_path: Path, size: str, suffix: str = "txt") -> list[str]:
    return (tmp_path / "samples" / f"few_{size}.{suffix}").read_text("utf-8").splitlines()


def test_one_caption_an_image_nested_and_seeded(tmp_path: Path, roots: Roots) -> None:
    source = written(tmp_path, coco())
    made = make_captions(source, dataset="few", roots=roots)
    large = lines(tmp_path, "large")
    assert len(large) == 8
    assert len({line.split(",")[0] for line in large}) == 8  # eight images
    assert set(large) <= {entry["caption"] for entry in coco()["annotations"]}
    assert lines(tmp_path, "medium") == large[:4]
    assert lines(tmp_path, "small") == large[:2]
    assert made["files"]["large"]["samples"] == 8
    other = make_captions(source, dataset="few", out=tmp_path / "other", seed=1, roots=roots)
    assert Path(other["files"]["large"]["path"]).read_text().splitlines() != large
    assert len({line[-8] for line in large}) > 1  # not always the first caption


def test_order_of_the_file_changes_nothing(tmp_path: Path, roots: Roots) -> None:
    make_captions(written(tmp_path, coco()), dataset="few", roots=roots)
    before = lines(tmp_path, "large")
    shuffled = coco()
    for key in ("images", "annotations"):
        random.Random(3).shuffle(shuffled[key])
    make_captions(written(tmp_path, shuffled), dataset="few", roots=roots)
    assert lines(tmp_path, "large") == before


def test_what_is_written_can_be_planned(tmp_path: Path, roots: Roots) -> None:
    from qsens.config import load_sweep

    make_captions(written(tmp_path, coco()), dataset="few", roots=roots)
    dataset = load_sweep("single", ["dataset=few"], roots=roots).config.dataset[0]
    found, notices = identify_samples(dataset, ("small", "medium", "large"))
    assert [found[size].available for size in found] == [2, 4, 8]
    assert notices == []


def test_duplicates_and_empty_captions_are_left_out(tmp_path: Path, roots: Roots) -> None:
    tree = coco(8)
    for entry in tree["annotations"]:
        if entry["image_id"] in (0, 1):  # one text for both images: one of them falls away
            entry["caption"] = "THE same " if entry["image_id"] else "the  same"
        if entry["image_id"] == 2 and entry["id"] % 100 < 2:
            entry["caption"] = " \n\t\u200b"
    source = written(tmp_path, tree)
    with pytest.raises(UserError) as caught:
        make_captions(source, dataset="few", roots=roots)
    assert "gives 7 captions, and size 'large' needs 8" in caught.value.what
    assert not (tmp_path / "samples").exists()
    make_captions(source, dataset="few", sizes=["small", "medium"], roots=roots)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "few_medium.txt",
        "few_small.txt",
    ]
    tree["images"].append({"id": 8, "file_name": "8.jpg"})
    tree["annotations"].append({"image_id": 8, "id": 800, "caption": "Eight."})
    made = make_captions(written(tmp_path, tree), dataset="few", replace=True, roots=roots)
    large = lines(tmp_path, "large")
    assert len(large) == 8
    assert [line.casefold() for line in large].count("the same") == 1
    assert any(line.startswith("Image 2,") and "the 2. time" in line for line in large)
    assert made["left_out"]["captions that came before"] == 3


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  A cat.\r\n Two\tdogs. ", "A cat. Two dogs."),
        ("cafe\u0301", "caf\u00e9"),
        ("a\u00a0b\u2028c\x85d", "a b c d"),
        ("\ufeffzero\u200bwidth\x00 \x1b[1m", "zerowidth [1m"),
        ("half \ud83d pair", "half pair"),
        ("\u732b\u3068\u72ac", "\u732b\u3068\u72ac"),
        ("\U0001f469\u200d\U0001f52c at work", "\U0001f469\u200d\U0001f52c at work"),
        ("\u0645\u06cc\u200c\u0631\u0648\u062f", "\u0645\u06cc\u200c\u0631\u0648\u062f"),
        ("\u200b \ufeff \u200d", ""),
    ],
)
def test_text_is_normalised(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


def test_images_make_jsonl_of_those_that_are_there(tmp_path: Path, roots: Roots) -> None:
    tree = coco()
    tree["images"][3]["file_name"] = "../outside.jpg"
    tree["images"][4]["file_name"] = "val/inner.jpg"
    images = tmp_path / "images"
    (images / "val").mkdir(parents=True)
    (tmp_path / "outside.jpg").write_bytes(b"x")
    for entry in tree["images"]:
        if entry["id"] not in (3, 5):
            (images / entry["file_name"]).write_bytes(b"x")
    (images / "000000000006.jpg").unlink()
    (images / "000000000006.jpg").symlink_to(tmp_path / "outside.jpg")
    source = written(tmp_path, tree)
    made = make_captions(source, dataset="few", images=images, roots=roots)
    rows = [json.loads(line) for line in lines(tmp_path, "large", "jsonl")]
    assert len(rows) == 8
    assert all(sorted(row) == ["caption", "image"] for row in rows)
    names = {entry["file_name"]: entry["id"] for entry in tree["images"]}
    for row in rows:
        assert (images / row["image"]).is_file()
        assert row["caption"].startswith(f"Image {names[row['image']]},")
    used = {names[row["image"]] for row in rows}
    assert used.isdisjoint({3, 5, 6})
    assert lines(tmp_path, "small", "jsonl") == lines(tmp_path, "large", "jsonl")[:2]
    assert set(made["left_out"]) <= {"images that are not there"}
    for entry in tree["images"]:
        (images / entry["file_name"]).unlink(missing_ok=True)
    with pytest.raises(UserError, match="gives 0 captions"):
        make_captions(source, dataset="few", images=images, replace=True, roots=roots)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe{}", "is no JSON"),
        (b"[" * 200_000, "is no JSON"),
        (b"[]", "the file: Input should be a valid dictionary"),
        (b'{"annotations": {}}', "annotations: Input should be a valid list"),
        (b'{"annotations": [7]}', "annotations.0: Input should be a valid dictionary"),
        (b'{"annotations": [{"id": 1, "image_id": 1}]}', "annotations.0.caption: Field required"),
        (b'{"annotations": [{"id": 1, "caption": "x"}]}', "annotations.0.image_id: Field required"),
        (
            b'{"annotations": [{"id": 1, "image_id": 1, "caption": null}]}',
            "annotations.0.caption: Input should be a valid string",
        ),
        (
            b'{"annotations": [{"id": 1, "image_id": [1], "caption": "x"}]}',
            "annotations.0.image_id",
        ),
        (b'{"annotations": []}', "gives 0 captions"),
    ],
)
def test_malformed_files_give_one_message(
    content: bytes, said: str, tmp_path: Path, roots: Roots
) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        make_captions(path, dataset="few", roots=roots)
    assert said in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.where == str(path)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (None, "images: Input should be a valid list"),
        ([{"id": 1}], "images.0.file_name: Field required"),
        ([{"id": 1, "file_name": 5}], "images.0.file_name: Input should be a valid string"),
        ([{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "image 1 has two files"),
    ],
)
def test_malformed_images_give_one_message(
    images: Any, said: str, tmp_path: Path, roots: Roots
) -> None:
    source = written(tmp_path, coco() | {"images": images})
    with pytest.raises(UserError) as caught:
        make_captions(source, dataset="few", images=tmp_path, roots=roots)
    assert said in caught.value.what


def test_other_files_are_overwritten_only_when_asked(tmp_path: Path, roots: Roots) -> None:
    source = written(tmp_path, coco())
    make_captions(source, dataset="few", roots=roots)
    before = {size: lines(tmp_path, size) for size in ("small", "medium", "large")}
    make_captions(source, dataset="few", roots=roots)  # the same content
    with pytest.raises(UserError, match="is there already"):
        make_captions(source, dataset="few", seed=5, roots=roots)
    assert {size: lines(tmp_path, size) for size in before} == before
    make_captions(source, dataset="few", seed=5, replace=True, roots=roots)
    assert lines(tmp_path, "large") != before["large"]


def test_full_disk_leaves_nothing(
    tmp_path: Path, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: Any) -> int:
        if "few_large" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    source = written(tmp_path, coco())
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TryAgain):
        make_captions(source, dataset="few", roots=roots)
    assert list((tmp_path / "samples").iterdir()) == []


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSENS_ROOT", str(tmp_path))
    source = written(tmp_path, coco(40))
    ran = CliRunner().invoke(cli.app, ["captions", str(source), "--size", "small", "--json"])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    path = tmp_path / "datasets/vlm-quantize-calib/coco2017_captions_small.txt"
    assert said["files"] == {"small": {"path": str(path), "samples": 16}}
    assert len(path.read_text().splitlines()) == 16


def test_a_data_set_of_pictures_says_where_they_are(tmp_path: Path, roots: Roots) -> None:
    names = {size: f"seen_{size}.jsonl" for size in ("small", "medium", "large")}
    (roots.configs[0] / "dataset/seen.yaml").write_text(
        f"name: seen\ndirectory: samples\nimages: photos\nfiles: {json.dumps(names)}\n"
        "sizes: {small: 2, medium: 4, large: 8}\n"
    )
    tree = coco()
    (tmp_path / "photos").mkdir()
    for entry in tree["images"][:9]:
        (tmp_path / "photos" / entry["file_name"]).write_bytes(b"x")
    made = make_captions(written(tmp_path, tree), dataset="seen", roots=roots)
    rows = [
        json.loads(line)
        for line in Path(made["files"]["large"]["path"]).read_text().split("\n")[:-1]
    ]
    assert len(rows) == 8
    assert all((tmp_path / "photos" / row["image"]).is_file() for row in rows)

"""Sample files in JSONL and in the older SQLite layout, which the tests make."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qsens.config import DatasetConfig
from qsens.data.captions import identify_samples, read_captions
from qsens.data.records import Record, read_records
from qsens.errors import UserError

Rows = list[tuple[Any, Any, Any, Any, Any]]
COLUMNS = "split TEXT, image_relpath TEXT, image_id INTEGER, caption_id INTEGER, caption TEXT"


def database(path: Path, rows: Rows, columns: str = COLUMNS) -> Path:
    with closing(sqlite3.connect(path)) as opened:
        opened.execute(f"CREATE TABLE vlm_calib_samples ({columns})")
        opened.execute("CREATE TABLE meta (key TEXT, value TEXT)")
        opened.execute("INSERT INTO meta VALUES ('source', 'coco2017')")
        opened.executemany("INSERT INTO vlm_calib_samples VALUES (?, ?, ?, ?, ?)", rows)
        opened.commit()
    return path


def row(split: str, number: int) -> tuple[Any, ...]:
    return (split, f"val2017/{number:012d}.jpg", number, 10 * number, f" Caption {number}. ")


def sized() -> Rows:
    """Return rows of three splits of 2, 4 and 6, each the head of the next, mixed up."""
    counts = {"small": 2, "medium": 4, "large": 6}
    return [row(split, n) for n in range(6) for split in counts if n < counts[split]]  # type: ignore


def test_rows_of_a_split_in_their_order(tmp_path: Path) -> None:
    path = database(tmp_path / "calib.sqlite", sized())
    assert read_records(path, "small")[0] == [
        Record("val2017/000000000000.jpg", "Caption 0."),
        Record("val2017/000000000001.jpg", "Caption 1."),
    ]
    assert read_captions(path, "large") == [f"Caption {n}." for n in range(6)]


@pytest.mark.parametrize("name", ["calib.sqlite", "calib.db", "a b#c?.sqlite3"])
def test_sizes_share_a_file(name: str, tmp_path: Path) -> None:
    database(tmp_path / name, sized())
    before = (tmp_path / name).read_bytes()
    dataset = DatasetConfig(
        directory=tmp_path,
        files={"small": name, "medium": name, "large": name},
        sizes={"small": 2, "medium": 4, "large": 6},
    )
    found, notices = identify_samples(dataset, ("small", "medium", "large"))
    assert [found[size].available for size in found] == [2, 4, 6]
    assert notices == []
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_split_serves_every_size(tmp_path: Path) -> None:
    path = database(tmp_path / "calib.sqlite", [row("calib", n) for n in range(3)])  # type: ignore
    assert read_captions(path, "small") == read_captions(path, "large")
    assert len(read_captions(path, "small")) == 3


def test_splits_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    rows = [row("small", 5), row("small", 1), *(row("medium", n) for n in range(4))]
    database(tmp_path / "calib.sqlite", rows)  # type: ignore
    dataset = DatasetConfig(
        directory=tmp_path,
        files={"small": "calib.sqlite", "medium": "calib.sqlite"},
        sizes={"small": 2, "medium": 4},
        size=("small", "medium"),
    )
    with pytest.raises(UserError, match="is not the head of"):
        identify_samples(dataset, ("small", "medium"))


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        ([row("train", 1), row("val", 2)], COLUMNS, "has no split 'small'; its splits are"),
        ([("s", "a.jpg", 1, 1, None)], COLUMNS, "caption of row 1 of split 's' is no text"),
        ([("s", "a.jpg", 1, 1, b"\xff")], COLUMNS, "caption of row 1 of split 's' is no text"),
        ([("s", "../a.jpg", 1, 1, "x")], COLUMNS, "lies outside the images' directory"),
        ([("s", "/etc/passwd", 1, 1, "x")], COLUMNS, "lies outside the images' directory"),
        (
            [("s", 1, 1, 1, "x")],
            "split TEXT, image_relpath BLOB, image_id, caption_id, caption",
            "the image of row 1 of split 's' is no path",
        ),
        ([("s", "a", 1, 1, "x")], "split, path, image_id, caption_id, caption", "image_relpath"),
        ([], COLUMNS, "holds no caption"),
    ],
)
def test_broken_tables_give_one_message(
    rows: Rows, columns: str, said: str, tmp_path: Path
) -> None:
    path = database(tmp_path / "calib.sqlite", rows, columns)
    with pytest.raises(UserError) as caught:
        read_captions(path, "small")
    assert said in caught.value.what
    assert str(path) in caught.value.where


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calib.sqlite"
    path.write_bytes(b"one caption a line\n" * 100)
    with pytest.raises(UserError, match="not a database"):
        read_captions(path, "small")
    path.unlink()
    with closing(sqlite3.connect(path)) as opened:
        opened.execute("CREATE TABLE other (x)")
        opened.commit()
    with pytest.raises(UserError, match="no such table: vlm_calib_samples"):
        read_captions(path, "small")
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(tmp_path / "none.sqlite", "small")


def test_what_still_lies_in_a_log_is_not_overlooked(tmp_path: Path) -> None:
    path = database(tmp_path / "calib.sqlite", sized())
    with closing(sqlite3.connect(path)) as opened:
        opened.execute("PRAGMA journal_mode = WAL")
        opened.execute("UPDATE vlm_calib_samples SET caption = 'changed'")
        opened.commit()
        with pytest.raises(UserError, match="write-ahead log"):
            read_captions(path, "small")
    assert read_captions(path, "small") == ["changed", "changed"]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "calib.jsonl"
    entries = [
        {"image": "val2017/1.jpg", "caption": " One.\u2028Still one. "},
        {"image": "2.jpg", "caption": "  "},
        {"caption": "No image."},
    ]
    text = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    assert read_records(path, "small")[0] == [
        Record("val2017/1.jpg", "One.\u2028Still one."),
        Record("", "No image."),
    ]
    assert read_captions(path) == ["One.\u2028Still one.", "No image."]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "line 2 is no JSON"),
        (b"\xff", "line 2 is no JSON"),
        (b"[" * 100_000, "line 2 is no JSON"),
        (b"[]", "line 2 is no object with a 'caption'"),
        (b'{"image": "a.jpg"}', "line 2 is no object with a 'caption'"),
        (b'{"caption": "\\ud83d"}', "the caption of line 2 holds half of a surrogate pair"),
        (b'{"caption": 1}', "the caption of line 2 is no text"),
        (b'{"caption": "x", "image": 1}', "the image of line 2 is no path"),
        (b'{"caption": "x", "image": "a/../../b.jpg"}', "the image of line 2 lies outside"),
        (b'{"caption": "x", "image": "..\\\\b.jpg"}', "the image of line 2 lies outside"),
        (b'{"caption": "x", "image": "a\\u0000"}', "the image of line 2 lies outside"),
    ],
)
def test_broken_lines_give_one_message(line: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "calib.jsonl"
    path.write_bytes(b'{"image": "a.jpg", "caption": "A."}\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        read_captions(path)
    assert said in caught.value.what
    assert str(path) in caught.value.where


def test_what_captions_writes_is_read(tmp_path: Path) -> None:
    from qsens.tools.coco import make_captions

    images = tmp_path / "images"
    images.mkdir()
    tree: dict[str, Any] = {"images": [], "annotations": []}
    for number in range(20):
        (images / f"{number}.jpg").touch()
        tree["images"].append({"id": number, "file_name": f"{number}.jpg"})
        tree["annotations"].append(
            {"id": number, "image_id": number, "caption": f"Caption {number}."}
        )
    source = tmp_path / "captions.json"
    source.write_text(json.dumps(tree))
    make_captions(source, out=tmp_path, images=images, sizes=["small"])
    records, _ = read_records(tmp_path / "coco2017_captions_small.jsonl", "small")
    assert len(records) == 16
    for record in records:
        assert record.caption == f"Caption {record.image.removesuffix('.jpg')}."


def test_scores_do_not_depend_on_the_kind_of_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from qsens.config import Roots
    from qsens.pipeline.plan import plan_sweep
    from qsens.pipeline.sweep import run_sweep
    from qsens.store import Store
    from tests.checkpoint.tiny_families import CAPTIONS, configuration, save

    checkpoint = save(configuration("Llama", tied=True), tmp_path / "checkpoint")
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS))
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"image": "a.jpg", "caption": caption}) for caption in CAPTIONS)
    )
    other = [("large", "b.jpg", 9, 9, "two red squares")]
    database(
        tmp_path / "c.sqlite",
        [*other, *(("small", "a.jpg", n, n, caption) for n, caption in enumerate(CAPTIONS))],
    )
    roots = Roots.from_environment()
    found = []
    for kind in ("txt", "jsonl", "sqlite"):
        plan = plan_sweep(
            "single",
            [
                f"model.path={checkpoint}",
                "model.dtype=float32",
                f"dataset.directory={tmp_path}",
                f"dataset.files.small=c.{kind}",
                "dataset.sizes.small=4",
                "quant_pair=wint8_aint8",
                "autoquant.device=cpu",
            ],
            roots=Roots(root=roots.root, results=tmp_path / "results", configs=roots.configs),
        )
        published, errors = run_sweep(plan)
        assert errors == []
        assert published["complete"]
        (cell,) = plan.cells
        found.append(load_file(Store(plan).state(cell)))
    for state in found[1:]:
        assert state.keys() == found[0].keys()
        for name, tensor in state.items():
            assert tensor.equal(found[0][name]), name

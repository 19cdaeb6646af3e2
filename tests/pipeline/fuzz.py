"""Reads files with one of them damaged, of every kind; a line of JSON for each that went wrong.

    python -m tests.pipeline.fuzz DIRECTORY SEED SECONDS

A program of its own: what it took is measured.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import random
import signal
import sqlite3
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import yaml

from qsens.analysis.audit import judge
from qsens.analysis.samples import read_samples as read_samples_of
from qsens.checkpoint.templates import check_chat_template
from qsens.checksums import sealed
from qsens.config import Roots, choices, load_sweep
from qsens.data.captions import read_samples
from qsens.data.images import read_resolution
from qsens.documents import dump_document
from qsens.engine.host_memory import most_memory
from qsens.errors import QsensError, TryAgain, UserError
from qsens.grid import read_plan
from qsens.pipeline.audit import is_audited
from qsens.pipeline.failures import Failure, failure_to_tell
from qsens.pipeline.plan import plan_json, plan_sweep
from qsens.pipeline.publish import publish, report
from qsens.pipeline.recipe import write_recipe
from qsens.published import shown_sweeps
from qsens.reading import read_json
from qsens.schema.audit import Audit, Point
from qsens.store import Store
from qsens.tools.coco import draw, read_annotations
from qsens.tools.prune import prune
from qsens.writing import write_bytes, write_text
from tests.pipeline import results

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
}
JSON: dict[str, Any] = {
    "config.json": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "auto_map": {"AutoConfig": "my.Config"},
        "text_config": TEXT,
        "vision_config": {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
    },
    "model.safetensors.index.json": {
        "metadata": {"total_size": 1},
        "weight_map": {
            "model.language_model.embed_tokens.weight": SHARDS[0],
            "model.language_model.layers.0.mlp.down_proj.weight": SHARDS[1],
        },
    },
    "tokenizer.json": {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    },
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{}"},
    "preprocessor_config.json": {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 4096},
    },
    "chat_template.json": {"chat_template": "{{ messages }}"},
}
HEADERS: dict[str, Any] = {
    SHARDS[0]: {
        "__metadata__": {"format": "pt"},
        "model.language_model.embed_tokens.weight": {
            "dtype": "F32",
            "shape": [32, 16],
            "data_offsets": [0, 2048],
        },
    },
    SHARDS[1]: {
        "model.language_model.layers.0.mlp.down_proj.weight": {
            "dtype": "BF16",
            "shape": [16, 32],
            "data_offsets": [0, 1024],
        },
    },
}
DEEP = "#deep"
LONG = "#long"
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    1 << 31,
    1 << 63,
    10**4000,
    1e308,
    0.5,
    "",
    "x",
]
VALUES += [float("nan"), float("inf"), "n" * 300, "../x.safetensors", "/etc/passwd", "\0", "\ud800"]
VALUES += ["\x1b[2J\n", [], {}, [[]], [0], {"a": {}}, [None] * 1000, DEEP, LONG, "F8_E4M3", "su"]
VALUES += [SHARDS[1], {"a": [{"b": "c"}] * 9}]


def text_of(value: Any, rng: random.Random) -> bytes:
    """Return JSON, with what no library writes put in."""
    depth = rng.choice([50, 99, 900, 100_000])
    text = json.dumps(value).replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    text = text.replace(f'"{LONG}"', "9" * 5000)
    data = bytearray(text.encode())
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        at = rng.randrange(max(1, len(data)))
        data[at : at + rng.choice([0, 1, 1, 40])] = rng.choice(
            [b"", b"\xff", b"\0", b"{", b"]", b'"', b",", b"1", b"1" * 50]
        )
    return bytes(data)


def change(value: Any, rng: random.Random) -> Any:
    """Return JSON data with one thing in it replaced, renamed, or taken away."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], change(value[at], rng), *value[at + 1 :]]
    key = rng.choice(list(value))
    rest = {name: one for name, one in value.items() if name != key}
    action = rng.random()
    if action < 0.1:
        return rest
    if action < 0.2:
        return rest | {rng.choice(["", "x", "\ud800", "n" * 300, "__metadata__"]): value[key]}
    return value | {key: change(value[key], rng)}


def write(directory: Path, rng: random.Random) -> str:
    """Write a checkpoint with one file damaged; return that file's name."""
    damaged = rng.choice([*JSON, *HEADERS, *HEADERS])
    for name, value in JSON.items():
        data = json.dumps(value).encode()
        if name == damaged:
            data = text_of(change(value, rng), rng)
        (directory / name).write_bytes(data)
    for name, value in HEADERS.items():
        header = json.dumps(value).encode()
        length = len(header)
        if name == damaged:
            header = text_of(change(value, rng), rng)
            length = rng.choice([len(header)] * 9 + [0, length, 1 << 24, 1 << 62])
        (directory / name).write_bytes(struct.pack("<Q", length) + header + bytes(2048))
        size = 2048 if name == SHARDS[0] else 1024
        with (directory / name).open("r+b") as file:
            file.truncate(8 + len(header) + size)
    return damaged


def write_checkpoint(directory: Path) -> None:
    """Write a checkpoint that can be planned."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in JSON.items():
        (directory / name).write_text(json.dumps(value))
    for name, value in HEADERS.items():
        header = json.dumps(value).encode()
        size = max(entry["data_offsets"][1] for key, entry in value.items() if key[0] != "_")
        (directory / name).write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def wrong(work: Callable[[], object]) -> str:
    """Return what is wrong with how something ended; empty where nothing is."""
    try:
        work()
    except (UserError, TryAgain) as error:
        one_line = error.what.isprintable() and error.where.isprintable() and error.remedy
        return "" if one_line and len(error.what) < 1000 else f"message: {error!r}"
    except QsensError as error:
        return f"exit code {error.exit_code}: {error!r}"
    except Exception:
        return traceback.format_exc()
    return ""


class Checkpoint:
    """The files of a checkpoint, read when a sweep is planned."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "checkpoint"
        self.path.mkdir()
        self.roots = roots_of(directory)

    def damage(self, rng: random.Random) -> str:
        """Damage a file, and return which."""
        return write(self.path, rng)

    def read(self, rng: random.Random) -> None:
        """Read all of them."""
        words = ["dataset=demo", "quant_pair=wint8_afp16", f"model.path={self.path}"]
        plan = plan_sweep("single", words, roots=self.roots)
        read_resolution(plan.config.model, 262144)
        check_chat_template(self.path, "pictures")


class Stored:
    """What sweeps have stored and published, and the manifests of others."""

    def __init__(self, directory: Path) -> None:
        made = results.whole(results.plan(directory / "stored", day=1), seed=1)
        publish(made)
        self.made = results.whole(results.plan(made.results, day=2, checkpoint="b"), seed=2)
        self.store = Store(self.made)
        self.cell = self.made.cells[0]
        write_text(self.store.audit(self.cell), dump_document(self._audit()))
        failed = Failure(error="UserError", what="it was refused", told=False)
        write_text(self.store.failure(self.cell), dump_document(failed))
        publish(self.made)
        self.plan = directory / "plan.json"
        write_text(self.plan, plan_json(self.made))
        older = read_json(self.store.manifest(self.cell), remedy="")
        for key in ("schema_version", "checksum", "state_digest", "cell_digest"):
            del older[key]
        self.older = directory / "older" / "x_quant_manifest.json"
        write_text(self.older, json.dumps(older))
        shown = self.store.published(self.cell)
        sweep = self.store.sweep_dir()
        files = [
            self.plan,
            self.older,
            self.store.manifest(self.cell),
            self.store.state(self.cell),
            self.store.audit(self.cell),
            self.store.failure(self.cell),
            shown["manifest"],
            shown["state"],
            shown["manifest"].with_name(".sweep"),
            sweep / "plan.json",
            sweep / "summary.json",
        ]
        self.files = {file: file.read_bytes() for file in files}

    def _audit(self) -> Audit:
        points = [
            Point(layer=results.LAYERS[0], kind="down", estimate=1, standard_error=1, truth=1)
        ]
        return Audit(
            **self.cell.model_dump(
                include={"cell", "pair", "granularity", "coverage", "modality", "size"}
            ),
            cell_digest=self.cell.digest,
            method="fisher",
            mode="sample",
            samples=1,
            points=tuple(points),
            judgement=judge(points, in_nats=True),
            seconds=1,
            device="cpu",
            measured_kl=2,
        )

    def damage(self, rng: random.Random) -> str:
        """Damage a file, and return which."""
        for file, content in self.files.items():
            write_bytes(file, content)
        damaged = rng.choice(list(self.files))
        content = self.files[damaged]
        if damaged.suffix == ".json":
            changed = change(json.loads(content), rng)
            if isinstance(changed, dict) and rng.random() < 0.7:
                # What a checksum says nothing about is for the schema to say.
                with contextlib.suppress(ValueError):
                    changed = sealed(changed)
            content = text_of(changed, rng)
        elif damaged.suffix == ".safetensors" and rng.random() < 0.7:
            (length,) = struct.unpack_from("<Q", content)
            header = text_of(change(json.loads(content[8 : 8 + length]), rng), rng)
            content = struct.pack("<Q", len(header)) + header + content[8 + length :]
        else:
            content = noisy(content, rng)
        write_bytes(damaged, content)
        return str(damaged)

    def read(self, rng: random.Random) -> None:
        """Read them as one of the commands does."""
        reads: list[Callable[[], object]] = [
            lambda: publish(read_plan(self.plan)),
            lambda: report(self.older.parent),
            lambda: report(self.store.cell_dir(self.cell)),
            lambda: report(self.store.sweep_dir()),
            lambda: write_recipe(str(self.store.sweep_dir()), bits=12.0, target="modelopt"),
            lambda: prune(self.made.results, keep_sweeps=1, keep_days=1, dry_run=True),
            lambda: is_audited(self.made),
            lambda: shown_sweeps(self.store.model_dir()),
            lambda: [self.store.is_done(cell) for cell in self.made.cells],
            lambda: failure_to_tell(self.store, self.cell),
            lambda: read_samples_of(self.store.published(self.cell)["state"], "gradient"),
        ]
        rng.choice(reads)()


class Samples:
    """Sample files of every kind."""

    CALL: ClassVar = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    MESSAGES: ClassVar = [
        {"role": "system", "content": "kind"},
        {"role": "user", "content": [{"type": "text", "text": "red"}, "square"]},
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "so"},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "assistant", "content": "a square"},
    ]
    ENTRIES: ClassVar = [
        {"image": "a.jpg", "caption": "a red square"},
        {"text": "a red square"},
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": MESSAGES[:2], "completion": "a square"},
    ]

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "samples"
        self.directory.mkdir()
        self.path = self.directory

    def damage(self, rng: random.Random) -> str:
        """Damage a file, and return which."""
        kind = rng.choice(["txt", "jsonl", "json", "jsonl.gz", "parquet", "sqlite"])
        self.path = self.directory / f"samples.{kind}"
        self.path.unlink(missing_ok=True)
        if kind == "sqlite":
            self._database(rng)
            if rng.random() < 0.6:
                self.path.write_bytes(noisy(self.path.read_bytes(), rng))
        elif kind.startswith("jsonl"):
            entry = rng.choice(self.ENTRIES)
            data = b"\n".join(text_of(change(entry, rng), rng) for _ in range(3))
            if kind.endswith(".gz"):
                data = gzip.compress(data)
                data = noisy(data, rng) if rng.random() < 0.5 else data
            self.path.write_bytes(data)
        elif kind == "json":
            self.path.write_bytes(text_of(change([rng.choice(self.ENTRIES)] * 3, rng), rng))
        elif kind == "parquet":
            table = pyarrow.Table.from_pylist([rng.choice(self.ENTRIES[:2] + self.ENTRIES[3:4])])
            pyarrow.parquet.write_table(table, self.path)
            self.path.write_bytes(noisy(self.path.read_bytes(), rng))
        else:
            self.path.write_bytes(noisy(b"a red square\n\xc3\xa4 blue one\r\n" * 9, rng))
        return str(self.path)

    def _database(self, rng: random.Random) -> None:
        columns = "split, image_relpath, caption" if rng.random() < 0.8 else "split, caption"
        table = "vlm_calib_samples" if rng.random() < 0.9 else "others"
        values = ["small", "a.jpg", "a red square", None, 1.5, b"\xff", "../x", "\0", 1 << 40]
        with contextlib.closing(sqlite3.connect(self.path)) as opened:
            kind = "TABLE"
            opened.execute(f"CREATE {kind} {table} ({columns})")
            marks = ", ".join("?" for _ in columns.split(","))
            for _ in range(9):
                row = ["small", "a.jpg", "a red square"][-len(columns.split(",")) :]
                row[rng.randrange(len(row))] = rng.choice(values)
                opened.execute(f"INSERT INTO {table} VALUES ({marks})", row)
            opened.commit()

    def read(self, rng: random.Random) -> None:
        """Read it."""
        read_samples((self.path,), "small")


class Annotations:
    """COCO's annotation files."""

    TREE: ClassVar = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)],
        "annotations": [{"id": n, "image_id": n // 2, "caption": f"a {n}"} for n in range(8)],
    }

    def __init__(self, directory: Path) -> None:
        self.path = directory / "captions.json"
        self.images = directory

    def damage(self, rng: random.Random) -> str:
        """Damage it."""
        self.path.write_bytes(text_of(change(self.TREE, rng), rng))
        return str(self.path)

    def read(self, rng: random.Random) -> None:
        """Draw captions from it."""
        images = rng.choice([None, self.images])
        read = read_annotations(self.path, with_images=images is not None)
        list(draw(read, images=images, seed=1, left_out=Counter()))


class Configuration:
    """The YAML files of a sweep."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "configs"
        shipped = roots_of(directory).configs
        self.roots = Roots(root=directory, results=directory, configs=(self.directory, *shipped))
        self.files = {
            Path(group, f"{name}.yaml"): choices(group)[name].read_bytes()
            for group, name in (
                ("sweep", "demo-text"),
                ("model", "tiny_qwen3_vl"),
                ("dataset", "demo"),
                ("quant_pair", "wint8_aint8"),
                ("quant_granularity", "w_group64"),
            )
        }

    def damage(self, rng: random.Random) -> str:
        """Damage a file, and return which."""
        damaged = rng.choice(list(self.files))
        for name, content in self.files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if rng.random() < 0.5:
            content = noisy(self.files[damaged], rng)
        else:
            # JSON is YAML.
            content = text_of(change(yaml.safe_load(self.files[damaged]), rng), rng)
        (self.directory / damaged).write_bytes(content)
        return str(damaged)

    def read(self, rng: random.Random) -> None:
        """Read the sweep."""
        words = ["quant_pair=wint8_aint8", "quant_granularity=default,w_group64"]
        load_sweep("demo-text", words, roots=self.roots)


SUBJECTS = (Checkpoint, Stored, Samples, Annotations, Configuration)


def roots_of(directory: Path) -> Roots:
    """Return where things lie, results below a directory."""
    configs = Roots.from_environment().configs
    return Roots(root=directory, results=directory / "results", configs=configs)


def noisy(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with some of them changed, cut off, or more."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 2, 5])):
        at = rng.randrange(max(1, len(found)))
        found[at : at + rng.choice([0, 1, 9])] = rng.randbytes(rng.choice([0, 1, 9]))
    return bytes(found[: rng.choice([len(found)] * 4 + [rng.randrange(len(found) + 1)])])


def main(directory: Path, seed: int, seconds: float) -> None:
    """Go on until the time is over; print what was wrong, then how many were tried."""
    directory.mkdir(exist_ok=True)
    logging.disable(logging.CRITICAL)
    subjects = [kind(directory) for kind in SUBJECTS]
    counts: dict[str, Counter[str]] = {type(one).__name__: Counter() for one in subjects}
    slowest, begun, turn = 0.0, time.process_time(), 0
    while time.process_time() - begun < seconds:
        for subject in subjects:
            name = type(subject).__name__
            rng = random.Random(f"{seed}-{turn}-{name}")
            damaged = subject.damage(rng)
            read = False

            def work(subject: Any = subject, rng: random.Random = rng) -> None:
                nonlocal read
                subject.read(rng)
                read = True

            started = time.process_time()
            signal.alarm(200)
            said = wrong(work)
            signal.alarm(0)
            slowest = max(slowest, time.process_time() - started)
            counts[name].update(tried=1, read=int(read))
            if said:
                what = {"seed": f"{seed}-{turn}-{name}", "file": damaged, "said": said}
                print(json.dumps(what))
        turn += 1
    last = {"counts": counts, "bytes": most_memory(), "seconds": slowest}
    print(json.dumps(last))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))

"""Plans sweeps of checkpoints with a damaged file each; a line of JSON for each that went wrong.

    python fuzz.py DIRECTORY SEED SECONDS

A program of its own: what it took is measured.
"""

from __future__ import annotations

import json
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsens.config import Roots
from qsens.engine.host_memory import most_memory
from qsens.engine.pictures import read_resolution
from qsens.engine.templates import check_chat_template
from qsens.errors import QsensError, TryAgain, UserError
from qsens.pipeline.plan import plan_sweep

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
    "tokenizer.json": {"version": "1.0"},
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


def main(directory: Path, seed: int, seconds: float) -> None:
    """Go on until the time is over; print what was wrong, then how many were tried."""
    roots = Roots(
        root=directory, results=directory / "results", configs=Roots.from_environment().configs
    )
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    end, tried, planned = time.monotonic() + seconds, 0, 0
    slowest = 0.0
    while time.monotonic() < end:
        rng = random.Random(f"{seed}-{tried}")
        damaged = write(checkpoint, rng)
        tried += 1

        def work() -> None:
            nonlocal planned
            plan = plan_sweep(
                "single",
                ["dataset=demo", "quant_pair=wint8_afp16", f"model.path={checkpoint}"],
                roots=roots,
            )
            read_resolution(plan.config.model, 262144)
            check_chat_template(checkpoint)
            planned += 1

        started = time.monotonic()
        signal.alarm(20)
        said = wrong(work)
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - started)
        if said:
            print(json.dumps({"seed": f"{seed}-{tried - 1}", "file": damaged, "said": said}))
    last = {"tried": tried, "planned": planned, "bytes": most_memory(), "seconds": slowest}
    print(json.dumps(last))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))

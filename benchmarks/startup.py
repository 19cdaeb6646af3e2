"""What a sweep costs beside its arithmetic: whole processes of the command line, in turns.

From the root of the repository:

    python -m benchmarks.startup --device cuda --shape qwen3-vl-4b --against BEFORE

Builds a checkpoint of that shape with random weights and a tokenizer of its own below ``--work``
(or takes ``--model``), and times ``qsens --help``, ``qsens plan nightly`` of a checkpoint whose
digests are known, and ``qsens sweep nightly``: seven pairs at three sizes, audit and reports. Every
command is a process of its own; of both versions the first run is not counted, so that files lie in
memory and digests are known. ``BEFORE`` is another checkout of the repository. Seconds are of the
wall and of all processors; the last column is the ratio to this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._workload import ROOT, SHAPES, captions_file


@dataclass(frozen=True)
class Timed:
    """What one process took, in seconds.

    Attributes:
        wall: From its start to its end.
        processor: Of all its threads and children.
    """

    wall: float
    processor: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "startup")
    parser.add_argument("--model", type=Path, help="a checkpoint that is there already")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-vl-tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--against", type=Path, help="another checkout of the repository")
    parser.add_argument("--preset", default="nightly", help="the sweep")
    parser.add_argument("--method", default="gradient", help="autoquant.method")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the sweep")
    given = parser.parse_args(arguments)
    model = given.model or given.work / given.shape
    if not (model / "config.json").is_file():
        _checkpoint(model, given.shape, given.dtype, given.device)
    trees = {"now": ROOT, **({"before": given.against.resolve()} if given.against else {})}
    captions = captions_file()
    sweep = [
        given.preset,
        f"model.path={model.resolve()}",
        f"model.dtype={given.dtype}",
        f"dataset.directory={captions.parent.resolve()}",
        *(f"dataset.files.{size}={captions.name}" for size in ("small", "medium", "large")),
        f"autoquant.device={given.device}",
        f"autoquant.method={given.method}",
        *given.set,
    ]
    commands = {
        "help": ["--help"],
        "plan": ["plan", *sweep],
        # The same results root again: digests are known, results are computed anew.
        "sweep": ["sweep", *sweep, "runner.force=true"],
    }
    taken: dict[str, dict[str, list[Timed]]] = {}
    for run in range(given.runs + 1):
        for name, words in commands.items():
            for tree, path in trees.items():
                timed = _timed(path, given.work / tree, words)
                if run:
                    taken.setdefault(name, {}).setdefault(tree, []).append(timed)
    for name, by_tree in taken.items():
        row = {tree: _median(runs) for tree, runs in by_tree.items()}
        line: dict[str, Any] = {"command": name} | {tree: vars(each) for tree, each in row.items()}
        if "before" in row:
            line["ratio"] = round(row["before"].wall / row["now"].wall, 2)
        print(json.dumps(line))
    return 0


def _timed(tree: Path, results: Path, words: Sequence[str]) -> Timed:
    """Run a command of a checkout in a process of its own.

    Raises:
        subprocess.CalledProcessError: It failed; it has said why.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), *_elsewhere()]),
        "QSENS_ROOT": str(tree),
        "QSENS_RESULTS": str(results.resolve()),
        "HF_HUB_OFFLINE": "1",
    }
    results.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-P", "-m", "qsens", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timed(round(wall, 2), round(processor, 2))


def _elsewhere() -> list[str]:
    """Return the directories of PYTHONPATH that hold no qsens."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [path for path in paths if path and not (Path(path) / "qsens").is_dir()]


def _median(runs: Sequence[Timed]) -> Timed:
    return Timed(
        statistics.median(run.wall for run in runs),
        statistics.median(run.processor for run in runs),
    )


def _checkpoint(path: Path, shape: str, dtype: str, device: str) -> None:
    """Write a checkpoint of a shape with random weights, and a tokenizer of the captions."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from benchmarks._workload import build_shape
    from qsens.checkpoint.loading import resolve_device

    model: Any = build_shape(shape, resolve_device(device), getattr(torch, dtype))
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    most = SHAPES[shape]["text_config"]["vocab_size"] // 2
    special = ["<unk>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=most, special_tokens=special, show_progress=False)
    tokenizer.train([str(captions_file())], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    ).save_pretrained(path)


if __name__ == "__main__":
    sys.exit(main())

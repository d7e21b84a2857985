"""Checkpoints: a folder of safetensors, YAML and JSON; nothing in it is unpickled.

config.yaml              `format: 2`, the bytes of every other file, the exact configuration
connector.safetensors    projectors, alpha, scorer
adapter/                 LoRA in PEFT's own layout
language/                a transformers directory, where the whole language model trains
teacher.safetensors      the attention teacher's snapshot, once warm-up has ended
base.json                name, address and digest of every base weight it stands on
training/                float32 masters and Adam moments by parameter name, and progress
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ultra import storage
from ultra.config import ConfigError, LanguageConfig, ModelConfig, PipelineConfig, parse
from ultra.model.encoders import FrozenEncoders
from ultra.model.integrity import CheckpointError, check_whole, list_sizes
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra, VisualBranch
from ultra.model.selection import FrameScorer
from ultra.model.vision import Fusion
from ultra.model.vision_encoder import digest_weights

FORMAT = 2
READABLE = (1, 2)
"""Formats that are read; 1 does not list its files, so nobody can tell whether it is whole."""
CONNECTOR = ("fusion.", "scorer.")
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training has come.

    Attributes:
        stage: index of the stage the next step belongs to.
        step: optimizer steps done in that stage.
        total_step: optimizer steps done over all stages.
        epoch: the first pass over the exams that is not complete, from 0 for each stage.
        seen: (epoch, exam id) of what was used in that and later passes.
        best: the lowest validation loss of the stage, once there is one.
        stale: looks at the validation split since that one.
    """

    stage: int = 0
    step: int = 0
    total_step: int = 0
    epoch: int = 0
    seen: tuple[tuple[int, str], ...] = ()
    best: float | None = None
    stale: int = 0


@dataclass(frozen=True, slots=True)
class Moments:
    """The optimizer's state by parameter name: float32 masters and Adam's two moments."""

    masters: Mapping[str, Tensor]
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; `folder` is local."""

    uri: str
    folder: Path
    config: PipelineConfig
    base: Mapping[str, Mapping[str, str]]

    def progress(self) -> Progress:
        """Return how far the training that wrote it had come.

        Raises:
            CheckpointError: when it holds none, as a final checkpoint does.
        """
        try:
            values = json.loads((self.folder / "training" / "progress.json").read_text())
        except OSError:
            raise CheckpointError(f"{self.uri}: holds no state of training to go on from") from None
        seen = tuple((epoch, exam_id) for epoch, exam_id in values["seen"])
        return Progress(**{**values, "seen": seen})

    def moments(self) -> Moments:
        """Return the optimizer's state."""
        names = ("masters", "exp_avg", "exp_avg_sq")
        return Moments(**{n: _load(self.folder / "training" / f"{n}.safetensors") for n in names})

    def teacher(self) -> dict[str, Tensor] | None:
        """Return the attention teacher's snapshot, or None before warm-up has ended."""
        path = self.folder / "teacher.safetensors"
        return _load(path) if path.exists() else None


def describe_base(config: ModelConfig) -> dict[str, dict[str, str]]:
    """Return name, address and digest of every base weight a model stands on."""
    uris: dict[str, str] = {encoder.name: encoder.weights for encoder in config.vision.encoders}
    uris["language"] = config.language.weights
    return {
        name: {"uri": uri, "sha256": digest_weights(storage.fetch(uri))}
        for name, uri in uris.items()
    }


def write(
    folder: Path,
    config: PipelineConfig,
    weights: Mapping[str, Tensor],
    language: LanguageBranch,
    base: Mapping[str, Mapping[str, str]],
    *,
    teacher: Mapping[str, Tensor] | None = None,
    moments: Moments | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint into an empty local folder.

    Args:
        folder: where to write.
        config: the exact configuration.
        weights: whole tensors by parameter name: the connector, LoRA, and, where the whole
            language model trains, all of it.
        language: gives PEFT's and the tokenizer's files; its own tensors are not read.
        base: what `describe_base` returned.
        teacher: the attention teacher's state, once there is one.
        moments: the optimizer's state.
        progress: how far training has come.

    Raises:
        CheckpointError: for an empty tensor or one with NaN or infinity, naming it.
    """
    connector = {n: t for n, t in weights.items() if n.startswith(CONNECTOR)}
    _save(folder / "connector.safetensors", connector)
    spoken = {
        n.removeprefix("language.model."): t
        for n, t in weights.items()
        if n.startswith("language.")
    }
    adapter = {name: tensor for name, tensor in spoken.items() if ".lora_" in name}
    if adapter:
        _write_adapter(folder / "adapter", language, adapter)
    if len(spoken) > len(adapter):
        _check(spoken)
        language.base.save_pretrained(folder / "language", state_dict=spoken)
        language.tokenizer.save_pretrained(folder / "language")
    if teacher is not None:
        _save(folder / "teacher.safetensors", teacher)
    if moments is not None:
        for name in ("masters", "exp_avg", "exp_avg_sq"):
            _save(folder / "training" / f"{name}.safetensors", getattr(moments, name))
    (folder / "base.json").write_text(json.dumps(base, indent=1))
    amend(folder, config, progress)


def amend(folder: Path, config: PipelineConfig, progress: Progress | None) -> None:
    """Give the files of a checkpoint a configuration and a progress, and list them.

    None takes away all that only training needs.
    """
    training = folder / "training"
    if progress is None:
        shutil.rmtree(training, ignore_errors=True)
    else:
        training.mkdir(exist_ok=True)
        text = json.dumps(asdict(progress), ensure_ascii=False)
        (training / "progress.json").write_text(text)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    files = yaml.safe_dump({"format": FORMAT, "files": list_sizes(folder)}, sort_keys=False)
    (folder / CONFIG_FILE).write_text(files + config.to_yaml(), encoding="utf-8")


def exists(uri: str) -> bool:
    """Return whether a checkpoint stands at an address, and all of it."""
    return storage.exists(storage.join(uri, CONFIG_FILE))


def read(uri: str) -> Checkpoint:
    """Return the checkpoint at an address, remote content copied here once.

    Raises:
        CheckpointError: when it is missing, unfinished, cut short or of another format.
    """
    try:
        folder = storage.fetch(uri)
        raw: Any = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        base = json.loads((folder / "base.json").read_text())
    except (OSError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"no checkpoint at {uri}: {error}") from None
    found = raw.pop("format", None) if isinstance(raw, dict) else None
    if found not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise CheckpointError(f"{uri}: checkpoint format {found}, this ultra reads {known}")
    check_whole(uri, folder, raw.pop("files", {}))
    try:
        return Checkpoint(uri, folder, parse(raw), base)
    except ConfigError as error:
        raise CheckpointError(f"{uri}: {error}") from None


def load_visual(uri: str, device: str = "cpu", *, with_encoders: bool = True) -> VisualBranch:
    """Return the encoder side of a checkpoint; no language-model weight is read.

    Args:
        uri: the checkpoint.
        device: where torch runs, `cpu` or `cuda`.
        with_encoders: False reads no encoder's weight either; what it returns takes features only.

    Raises:
        CheckpointError: when it, or a base weight it stands on, is not what it should be.
    """
    checkpoint = read(uri)
    config = checkpoint.config.model
    encoders = None
    if with_encoders:
        encoders = FrozenEncoders(config, device)
        for name, encoder in encoders.encoders.items():
            _check_digest(checkpoint, name, encoder.digest)
    state = _load(checkpoint.folder / "connector.safetensors")
    width = len(state["scorer.weight"])  # the language model's, known without loading it
    fusion = Fusion(config.vision, config.fusion, width)
    scorer = FrameScorer(width, config.selection.pool)
    _load_connector(fusion, scorer, state, uri)
    return VisualBranch(config, encoders, fusion.to(device).eval(), scorer.to(device).eval())


def load_language(uri: str, device: str = "cpu") -> LanguageBranch:
    """Return the language side of a checkpoint, ready to answer; no vision weight is read.

    Raises:
        CheckpointError: when it, or the base weight it stands on, is not what it should be.
    """
    checkpoint = read(uri)
    return _open_language(checkpoint, checkpoint.config.model.language).to(device).eval()


def load_model(uri: str, device: str = "cpu", config: ModelConfig | None = None) -> LlavaUltra:
    """Return the part of a checkpoint that trains: connector and language model.

    Args:
        uri: the checkpoint.
        device: where torch runs, `cpu` or `cuda`.
        config: settings of the model in place of the checkpoint's own, of the same architecture.

    Raises:
        CheckpointError: when it, or the base weight it stands on, is not what it should be.
    """
    checkpoint = read(uri)
    config = config or checkpoint.config.model
    model = LlavaUltra(config, _open_language(checkpoint, config.language))
    state = _load(checkpoint.folder / "connector.safetensors")
    _load_connector(model.fusion, model.scorer, state, uri)
    return model.to(device)


def _open_language(checkpoint: Checkpoint, config: LanguageConfig) -> LanguageBranch:
    whole, adapter = checkpoint.folder / "language", checkpoint.folder / "adapter"
    if not whole.exists():
        digest = digest_weights(storage.fetch(config.weights))
        _check_digest(checkpoint, "language", digest)
    return LanguageBranch(
        config, whole if whole.exists() else None, adapter if adapter.exists() else None
    )


def _load_connector(
    fusion: Fusion, scorer: FrameScorer, state: Mapping[str, Tensor], uri: str
) -> None:
    try:
        for prefix, module in zip(CONNECTOR, (fusion, scorer), strict=True):
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            module.load_state_dict(own)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{uri}: the connector does not fit its config: {detail}") from None


def _write_adapter(folder: Path, language: LanguageBranch, state: Mapping[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict

    _save(
        folder / "adapter_model.safetensors",
        get_peft_model_state_dict(language.model, state_dict=dict(state)),
    )
    settings = language.model.peft_config["default"]
    settings.base_model_name_or_path = language.config.weights
    settings.save_pretrained(folder)


def _check_digest(checkpoint: Checkpoint, name: str, digest: str) -> None:
    expected = checkpoint.base[name]
    if digest != expected["sha256"]:
        raise CheckpointError(
            f"{checkpoint.uri}: stands on {name} weights with digest {expected['sha256'][:12]}, "
            f"those at {expected['uri']} have {digest[:12]}"
        )


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    _check(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path)


def _check(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise CheckpointError(f"{name} is empty: it was not gathered before saving")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or infinity")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return tensors

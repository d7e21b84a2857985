"""The configuration: one frozen tree, from one YAML, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and what is allowed.

    Jobs print the message and stop; anything else is a fault of ours and shows where it happened.
    """


class ConfigError(InputError, ValueError):
    """A configuration that cannot be used; the message names the key and what is allowed."""


class Section(BaseModel):
    """A part of the tree: immutable, and it knows no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SimulatorConfig(Section):
    """Exams of the simulator, for `data.format: simulator`."""

    num_patients: Positive = 240
    max_exams_per_patient: Positive = 4
    """A patient has one to this many exams."""
    min_frames: Positive = 4
    max_frames: Positive = 6
    frame_size: Annotated[int, Field(ge=32, le=1024)] = 128
    """Side of the square frames, in pixels."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} exceeds max_frames {self.max_frames}")
        return self


class DataConfig(Section):
    """Where exams come from, where they go, and what is let in."""

    format: str = "simulator"
    """simulator, folder, or a format of FORMATS in `ultra/data/importers/formats.py`."""
    source_uri: str = ""
    """The folder or the file of annotations that the format is read from."""
    images_uri: str = ""
    """Where relative paths of frames begin; empty means the folder of `source_uri`."""
    encoding: str = "utf-8"
    """Of text files; tables from Chinese Windows are often `gb18030`."""
    stage: Literal["align", "instruct"] = "instruct"
    """The stage that conversations of an imported set are for, where the set does not say."""
    strict: bool = False
    """Whether a missing image ends `prepare` with an error; else its exam goes to quarantine."""
    simulator: SimulatorConfig = SimulatorConfig()
    exams_uri: str = "{root}/exams"
    quarantine_uri: str = "{root}/quarantine"
    audit_uri: str = "{root}/audit"
    """One row per frame let in: what shows that it carries no identity."""
    export_uri: str = "{root}/export"
    """Where `ray_jobs.export` writes exams for other trainers."""
    export_format: Literal["llava", "messages"] = "llava"
    """llava: a JSON list as LLaVA reads it; messages: JSON lines as LLaMA-Factory, ms-swift do."""
    card_uri: str = "{root}/card"
    """The data card: `index.html` for people, and lists of what was let in and left out."""
    features_uri: str = "{root}/features"
    seed: int = 0
    site_cue: bool = True
    """Whether every other question tells the site (section 4.2 of the paper)."""
    assume_deidentified: str = ""
    """The user's signed statement ("who, when") that plain images and videos carry no identity."""
    ocr: Literal["auto", "off", "require"] = "auto"
    """Whether letters inside DICOM regions are read and masked; auto: where ultra[ocr] is there."""
    patient_key_secret: str = ""
    """Key of the pseudonyms; empty means a fresh random one for every run of prepare."""
    validation_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.2
    max_frames: Annotated[int, Field(ge=1, le=64)] = 64
    """Frames kept of an exam; a longer cine is sampled evenly."""
    max_frame_bytes: Positive = 32 * 2**20
    max_frame_pixels: Positive = 25_000_000
    max_dicom_bytes: Positive = 512 * 2**20
    """Size of a DICOM or video file, which may hold a whole cine."""
    duplicate_threshold: Annotated[float, Field(ge=0)] = 2.0
    """Mean absolute difference, in grey levels, below which a frame repeats the one kept before."""
    exams_per_file: Positive = 1024
    """Exams of one file at most; fewer where that would leave CPUs idle."""
    row_group_mib: Annotated[int, Field(ge=1, le=64)] = 16

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.validation_fraction + self.test_fraction > 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and test_fraction "
                f"{self.test_fraction} must not exceed 1 together"
            )
        return self


class InstructionsConfig(Section):
    """Who writes conversations about the exams, and at what price.

    With an endpoint, the texts of reports leave for `base_url`: let it be one that may read them.
    """

    writer: Literal["rules", "endpoint", "translate"] = "rules"
    """rules: offline, from the report; endpoint: the same by a model behind an OpenAI-compatible
    API; translate: English conversations and reports into Chinese by that model."""
    base_url: str = ""
    """Of the API, up to and including `/v1`."""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; empty for an API that wants none."""
    extra_body: dict[str, Any] = {}
    """Fields that this API wants in every request beside those of OpenAI's."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    max_tokens: Positive = 2048
    """Of one reply."""
    conversations_per_exam: Annotated[int, Field(ge=1, le=40)] = 6
    """Asked of the endpoint about one exam."""
    max_concurrency: Positive = 16
    """Requests under way at a time, over the whole job."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Of a request, with growing pauses, after a lost connection, 408, 409, 429 or 5xx."""
    timeout_s: Annotated[float, Field(gt=0)] = 120
    prompt_price: Annotated[float, Field(ge=0)] = 0
    """Of a million prompt tokens."""
    completion_price: Annotated[float, Field(ge=0)] = 0
    """Of a million completion tokens."""
    spend_cap: Annotated[float, Field(gt=0)] | None = None
    """What all runs on these `replies_uri` may spend together, in the currency of the prices."""
    replies_uri: str = "{root}/instructions"
    """Every reply that was paid for, by the digest of its request."""
    rejected_uri: str = "{root}/rejected"
    """Table of the conversations that were not let in, with the reason."""
    review_uri: str = ""
    """A CSV for an expert: written by every run, and its decisions honoured; empty for none."""
    review_share: Fraction = 1.0
    """Share of the conversations that go into the sheet."""

    @model_validator(mode="after")
    def _reaches_an_endpoint(self) -> Self:
        if self.writer == "rules":
            return self
        if not self.model or not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"writer {self.writer} needs a model and a base_url of http or https")
        if self.spend_cap is not None and not (self.prompt_price or self.completion_price):
            raise ValueError("spend_cap needs prompt_price and completion_price")
        return self


class EncoderConfig(Section):
    """One frozen vision encoder."""

    name: str
    """clip, dinov2 or sam; see ENCODERS in `ultra/model/encoders.py`."""
    weights: str
    """A transformers directory (clip, dinov2), or a `.pth` or `.safetensors` file (sam)."""
    architecture: str = ""
    """What the weights are, for a plan where they are not at hand: a JSON file, or a name of
    `ultra/presets/architectures/`."""
    width: Positive
    """Channels of a visual token as this encoder gives it, after pooling to the grid."""
    layer: int = -2
    """clip, dinov2: the hidden layer that is read."""
    pool: Literal["unshuffle", "avgpool"] = "unshuffle"
    """sam: how its grid is brought to `grid`: space-to-depth (lossless) or averaging."""


class VisionConfig(Section):
    """The frozen encoders and the grid they share."""

    grid: Positive
    """Visual tokens along one side of a frame."""
    encoders: Annotated[tuple[EncoderConfig, ...], Field(min_length=1, max_length=2)]
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the features, in the cache and out of it."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [encoder.name for encoder in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"encoders must differ, got {names}")
        return self


class FusionConfig(Section):
    """Projectors and the weight between two encoders (Eq. 2)."""

    projector: Literal["linear", "mlp"] = "linear"
    weights: str = ""
    """Where the projector starts: a folder or a file as LLaVA or LLaVA-Med publish them."""
    normalise: bool = True
    """Whether features are layer-normed before a projector; LLaVA's and LLaVA-Med's read them as
    they are."""
    alpha: Fraction = 0.5
    """Start of the first encoder's weight; it is trained where a stage names `alpha`."""


class SelectionConfig(Section):
    """Which frame the language model sees, and how the choice learns (Eqs. 3 to 5)."""

    strategy: str = "adaptive"
    """adaptive, first, random, each, all, mean or composite; see STRATEGIES in
    `ultra/model/strategies.py`."""
    pool: Literal["max", "mean", "attention"] = "max"
    """How token scores become a frame's feature score (Eq. 3)."""
    gradient: Literal["straight_through", "hard", "gumbel", "soft"] = "straight_through"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    teacher: Literal["none", "attention", "likelihood"] = "attention"
    """Func. b of the paper: what the feature score is taught with; `none` is Func. a."""
    teacher_layers: Positive = 2
    """N of Eq. 4: language-model layers the attention teacher reads."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Norm of Eq. 5: the softmax of the teacher's scores is taken of scores / temperature."""
    teacher_warmup_steps: Annotated[int, Field(ge=0)] = 120
    """Steps before the redundancy loss starts, counted over all stages."""
    redundancy_weight: Annotated[float, Field(ge=0)] = 1.0


class LoraConfig(Section):
    """PEFT's LoRA on the language model."""

    rank: Positive = 8
    alpha: Positive = 16
    dropout: Fraction = 0.0
    targets: str | tuple[str, ...] = "all-linear"


class LanguageConfig(Section):
    """The causal language model."""

    weights: str
    """A transformers directory, LLaVA's and LLaVA-Med's among them, or a `.gguf` file."""
    architecture: str = ""
    """As that of an encoder; the JSON is a transformers `config.json`."""
    template: Literal["plain", "vicuna", "llama2", "chatml"] = "plain"
    max_length: Positive = 2048
    """Longest prompt and answer together, visual tokens included."""
    lora: LoraConfig | None = LoraConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"


class ModelConfig(Section):
    """LLaVA-Ultra and its relatives."""

    vision: VisionConfig
    fusion: FusionConfig = FusionConfig()
    selection: SelectionConfig = SelectionConfig()
    language: LanguageConfig

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of one frame (T)."""
        return self.vision.grid**2


class EncodeConfig(Section):
    """The job that fills the feature cache."""

    num_replicas: Positive = 1
    max_replicas: Positive | None = None
    """More than `num_replicas`: the pool grows to as many while work waits and the cluster has
    room. None keeps it as it is."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    """May be a fraction: several encoders on one GPU."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than num_replicas {self.num_replicas}"
            )
        return self


Part = Literal["projectors", "alpha", "scorer", "lora", "language"]


class StageConfig(Section):
    """One stage: what it trains, for how long, how fast."""

    name: Literal["align", "instruct"]
    trainable: Annotated[tuple[Part, ...], Field(min_length=1)]
    steps: Positive | None = None
    epochs: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_fraction: Fraction = 0.03
    conversations: Literal["one", "all"] = "one"
    """Of an exam in an epoch: one, another each time; or with it all that `language.max_length` has
    room for, behind the visual tokens, which they share and do not compute again. None sees
    another, and an exam counts as much as before: its loss is the mean of theirs."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if {"lora", "language"} <= set(self.trainable):
            raise ValueError("train lora or the whole language model, not both")
        return self


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu"] = "none"


class TrainConfig(Section):
    """The two stages and the machines they run on."""

    output_uri: str = "{root}/train"
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    start_from: str = ""
    """A checkpoint of ultra whose weights the first stage starts with: an address, or a version of
    a registered model as in `evaluate.checkpoint_uri`. Those that LLaVA publishes go into
    `model.language.weights` and `model.fusion.weights`."""
    resume_from: str = ""
    """A checkpoint to go on from: weights, optimizer, schedule and place in the data. A run that
    was cut off needs none, it finds its own."""
    features: Literal["auto", "require", "pixels"] = "auto"
    """auto: the feature cache when it holds every exam, pixels otherwise."""
    num_workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    batch_size: Positive = 16
    """Samples of one optimizer step, over all workers."""
    micro_batch_size: Positive = 16
    """Samples of one forward pass of one worker."""
    zero: ZeroConfig = ZeroConfig()
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """What the model computes in; what trains has float32 masters all the same. auto: bfloat16
    where the GPUs of all workers have it, float32 elsewhere; a run may go on on others."""
    learning_rate_scales: dict[Part, Annotated[float, Field(gt=0)]] = {"scorer": 5.0}
    """Part -> factor on a stage's rate. Projectors start as small as the token embeddings' standard
    deviation, and Adam's step does not shrink with a weight: give them about that factor."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; a stage's end always writes one."""
    keep_last: Positive | None = None
    """Checkpoints that stay beside the best and the final one, which always do; None keeps all."""
    validate_every: Positive | None = None
    """Steps between two looks at the validation split; a stage's end is one too. Each that finds
    the lowest loss of the stage writes the checkpoint `best`. None never looks."""
    validation_exams: Positive | None = None
    """Exams of the validation split that are looked at; None means all."""
    early_stopping_patience: Positive | None = None
    """Looks without a lower loss after which a stage ends; its best weights then go on. None goes
    through all steps and on with the last weights."""
    gradient_checkpointing: bool = False
    """Compute the language model's layers again in the backward pass instead of keeping what they
    computed: less memory, the same loss, a quarter more work, nearly half more where only LoRA
    trains. A plan tells where it is needed."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    log_every: Positive = 10
    explained_exams: Annotated[int, Field(ge=0)] = 3
    """Validation exams of which MLflow gets a picture at the end of every epoch and stage: which
    tokens scored, what each encoder says alone, and where the answer looked."""
    profile_steps: Annotated[int, Field(ge=0)] = 3
    """Steps of each stage that MLflow gets a picture of: where their time goes, part by part and by
    operator. 0 for none."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % (self.micro_batch_size * self.num_workers):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size} times num_workers {self.num_workers}"
            )
        return self

    @model_validator(mode="after")
    def _stops_by_what_it_sees(self) -> Self:
        if self.early_stopping_patience and not self.validate_every:
            raise ValueError("early_stopping_patience needs validate_every")
        if self.start_from and self.resume_from:
            raise ValueError("give start_from or resume_from, not both")
        return self

    def settle_precision(self, *, has_bfloat16: bool) -> Self:
        """Return these settings with the precision that `auto` is on some hardware."""
        if self.precision != "auto":
            return self
        return self.model_copy(update={"precision": "bfloat16" if has_bfloat16 else "float32"})

    @property
    def gradient_accumulation(self) -> int:
        """Forward passes of each worker in one optimizer step."""
        return self.batch_size // (self.micro_batch_size * self.num_workers)


Suite = Literal["strict", "llava_med"]

RESERVED_ROWS = {"model", "constant", "question_only", "lesion", "low95", "high95"}


class OtherModel(Section):
    """A model that answers the same questions, for a row beside ours.

    It has exactly one of `answers_uri`, `weights` and `base_url`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Of its row and its metrics."""
    answers_uri: str = ""
    """Answers given elsewhere: a `.jsonl` file with `question_id` and `text`, as LLaVA's, or the
    `predictions_uri` of another run."""
    weights: str = ""
    """A transformers directory of an image-text-to-text model, with its processor."""
    base_url: str = ""
    """An OpenAI-compatible endpoint, up to and including `/v1`."""
    model: str = ""
    """What the endpoint calls the model."""
    api_key_env: str = ""
    """The environment variable that holds the endpoint's key; empty for none."""
    request: dict[str, Any] = {"temperature": 0}
    """Further parameters of every request to the endpoint. With `max_tokens` among them it is not
    sent `max_completion_tokens`, which older servers do not know."""
    max_concurrency: Positive = 8
    """Requests under way at the same time."""
    frames: Literal["all", "first"] = "all"
    """Whether it is shown every frame of an exam or only the first."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of its weights."""

    @property
    def is_answered(self) -> bool:
        """Whether its answers are predictions of another run already."""
        return bool(self.answers_uri) and not self.answers_uri.endswith((".jsonl", ".json"))

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(map(bool, (self.answers_uri, self.weights, self.base_url))) != 1:
            raise ValueError(f"{self.name}: give one of answers_uri, weights and base_url")
        if self.base_url and not self.model:
            raise ValueError(f"{self.name}: base_url needs model, the name that it has there")
        if self.name in RESERVED_ROWS:
            raise ValueError(f"{self.name} is the name of another row")
        return self


class EvaluateConfig(Section):
    """Answering and scoring a split."""

    checkpoint_uri: str = "{root}/train/checkpoint"
    """An address, or a version of a registered model: models:/NAME@ALIAS, models:/NAME/3."""
    register_champion: bool = False
    """Make the checkpoint a version of `tracking.model_name`, and its champion where it is better
    than the champion there is."""
    register_metric: str = "strict/em"
    """What decides, one of the model's own metrics; larger is better."""
    predictions_uri: str = "{root}/predictions"
    results_uri: str = "{root}/evaluate"
    split: Literal["train", "validation", "test"] = "test"
    max_exams: Positive | None = None
    features: Literal["auto", "require", "pixels"] = "auto"
    """As `train.features`; with features no replica loads an encoder."""
    max_new_tokens: Positive = 128
    batch_size: Positive = 16
    num_replicas: Positive = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    reuse_predictions: bool = False
    """Score the predictions that are there instead of answering; needs no model."""
    suites: Annotated[tuple[Suite, ...], Field(min_length=1)] = ("strict", "llava_med")
    """Sets of metric definitions; a metric's name begins with its suite's."""
    tokenizer: Literal["char", "jieba", "model", "whitespace"] = "char"
    """What a token is to scores, part of their names; `whitespace` is what LLaVA-Med's code does,
    `model` the tokenizer of the checkpoint's language model."""
    bootstrap_samples: Annotated[int, Field(ge=0)] = 1000
    """Draws of exams behind the 95 % intervals; 0 for no intervals."""
    others: tuple[OtherModel, ...] = ()
    """Models whose answers are scored beside ours; those of NAME go to `predictions_uri`-NAME."""
    exams: Literal["auto", "table", "source"] = "auto"
    """Where the exams are read from. table: `data.exams_uri`; source: `data.format` and
    `data.source_uri`, prepared into `results_uri`/exams, so that a public set is scored without a
    `prepare`; auto: the table, and the source where one is named and no table is there."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.suites)) != len(self.suites):
            raise ValueError(f"suites must differ, got {list(self.suites)}")
        names = [other.name for other in self.others]
        if len(set(names)) != len(names):
            raise ValueError(f"others must differ in name, got {names}")
        return self

    @model_validator(mode="after")
    def _registers_what_it_asked(self) -> Self:
        if self.register_champion and self.reuse_predictions:
            raise ValueError(
                "register_champion: answers that are reused may be another checkpoint's; leave "
                "reuse_predictions out"
            )
        known = (*self.suites, "selection")
        if self.register_metric.partition("/")[0] not in known:
            raise ValueError(
                f"register_metric begins with {', '.join(f'{name}/' for name in known)}, got "
                f"{self.register_metric!r}"
            )
        return self


class TrackingConfig(Section):
    """MLflow."""

    uri: str = "sqlite:///{root}/mlflow.db"
    """Tracking server or database; empty switches tracking off."""
    experiment: str = "ultra"
    artifacts_uri: str = ""
    """Where a new experiment keeps artifacts; empty leaves it to the server."""
    model_name: Annotated[str, Field(pattern=r"^[^/:@]*$")] = "llava-ultra"
    """Registered model that checkpoints become versions of; empty registers none."""


class PipelineConfig(Section):
    """The whole tree."""

    name: str
    root: str = "runs/{name}"
    """Folder or s3:// address under which every part keeps its output."""
    data: DataConfig = DataConfig()
    instructions: InstructionsConfig = InstructionsConfig()
    model: ModelConfig
    encode: EncodeConfig = EncodeConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _weighs_what_there_is(self) -> Self:
        for index, stage in enumerate(self.train.stages):
            if "alpha" in stage.trainable and len(self.model.vision.encoders) == 1:
                raise ValueError(
                    f"train.stages.{index}.trainable: alpha weighs two encoders, "
                    "model.vision.encoders names one"
                )
        return self

    @model_validator(mode="after")
    def _registers_somewhere(self) -> Self:
        where = self.tracking
        if self.evaluate.register_champion and not (where.uri and where.model_name):
            raise ValueError(
                "evaluate.register_champion needs tracking.uri and tracking.model_name"
            )
        return self

    def to_yaml(self) -> str:
        """Return the tree as YAML that `load` reads back to an equal tree.

        Without `data.patient_key_secret`, which would undo every pseudonym: it is written nowhere.
        """
        tree = self.model_dump(mode="json", exclude={"data": {"patient_key_secret"}})
        return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


def preset_names() -> list[str]:
    """Return the names of the shipped presets."""
    folder = resources.files("ultra") / "presets"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def load(name_or_path: str, overrides: Iterable[str] = ()) -> PipelineConfig:
    """Return the checked tree of a preset or a YAML file.

    Args:
        name_or_path: a preset's name, or the path of a YAML file.
        overrides: `a.b=value` items, applied in order; values are YAML, nothing is an empty text.

    Raises:
        ConfigError: for an unknown preset, key or value, naming its path and what is allowed.
    """
    raw = _read(name_or_path)
    for item in overrides:
        _override(raw, item)
    return parse(raw)


def parse(raw: Any) -> PipelineConfig:
    """Return the checked tree of already read YAML, with `{root}` and `{name}` filled in."""
    try:
        config = PipelineConfig.model_validate(raw)
        root = config.root.replace("{name}", config.name).rstrip("/")
        return PipelineConfig.model_validate(_fill(config.model_dump(), root))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _read(name_or_path: str) -> dict[str, Any]:
    path: Any = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise ConfigError(f"no configuration file {name_or_path}")
    elif name_or_path in preset_names():
        path = resources.files("ultra") / "presets" / f"{name_or_path}.yaml"
    else:
        known = ", ".join(preset_names())
        raise ConfigError(f"unknown preset {name_or_path!r}; known: {known}; or give a .yaml file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no date
        raise ConfigError(f"{name_or_path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{name_or_path} must hold a mapping, got {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], item: str) -> None:
    path, equals, value = item.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set wants a.b=value, got {item!r}")
    *parents, last = path.split(".")
    node: Any = raw
    for key in parents:
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
        else:
            raise ConfigError(f"{path}: no key {key!r} to go through")
    try:
        parsed = yaml.safe_load(value) if value else ""
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
        raise ConfigError(f"{path}: {value!r} is not YAML") from None
    if isinstance(node, dict):
        node[last] = parsed
    elif isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = parsed
    else:
        raise ConfigError(f"{path}: no key {last!r} to set")


def _fill(node: Any, root: str) -> Any:
    if isinstance(node, dict):
        return {key: root if key == "root" else _fill(value, root) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_fill(value, root) for value in node]
    return node.replace("{root}", root) if isinstance(node, str) else node


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(_keys_at(error["loc"][:-1]))
        return f"{path}: unknown key; allowed: {allowed}"
    if error["type"] == "missing":
        return f"{path}: missing"
    shown = "" if isinstance(error["input"], dict | list) else f", got {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}: {message}{shown}" if path else message


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    section: Any = PipelineConfig
    for key in path:
        if isinstance(key, str) and key in section.model_fields:
            section = _section_in(section.model_fields[key].annotation)
    return list(section.model_fields)


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_in(inner)
        if found is not None:
            return found
    return None

"""The configuration: what it lets in, what it refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ultra.config import ConfigError, PipelineConfig, TrainConfig, load, parse, preset_names


def raw_config(**sections: Any) -> dict[str, Any]:
    """A small valid tree as YAML gives it."""
    return {
        "name": "small",
        "model": {
            "vision": {
                "grid": 3,
                "encoders": [{"name": "clip", "weights": "{root}/clip", "width": 5}],
            },
            "language": {"weights": "{root}/language"},
        },
        "train": {"stages": [{"name": "align", "trainable": ["projectors"], "steps": 7}]},
        **sections,
    }


def write(folder: Path, raw: Any) -> str:
    path = folder / "small.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


def refusal(*overrides: str, name: str = "tiny") -> str:
    with pytest.raises(ConfigError) as caught:
        load(name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_presets_that_ship_are_known() -> None:
    assert {"tiny", "llava-ultra-13b"} <= set(preset_names())


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("train.learning_rat", "train"),
        ("model.vision.encoders.1.widht", "model.vision.encoders.1"),
        ("train.stages.0.lr", "train.stages.0"),
        ("model.language.lora.r", "model.language.lora"),
        ("tracking.server", "tracking"),
    ],
)
def test_an_unknown_key_is_named_with_the_keys_allowed_beside_it(key: str, section: str) -> None:
    message = refusal(f"{key}=1")
    assert message.startswith(f"{key}: unknown key; allowed: ")
    node: Any = load("tiny").model_dump()
    for part in section.split("."):
        node = node[int(part)] if part.isdigit() else node[part]
    assert message.partition("allowed: ")[2].split(", ") == list(node)


def test_an_unknown_section_is_named() -> None:
    assert refusal("modle.vision.grid=4").startswith("modle: unknown key; allowed: name, root, ")


@pytest.mark.parametrize(
    ("override", "path", "detail"),
    [
        ("train.num_workers=0", "train.num_workers", "got 0"),
        ("train.num_workers=many", "train.num_workers", "got 'many'"),
        ("train.zero.stage=4", "train.zero.stage", "0, 1, 2 or 3"),
        ("train.precision=float16", "train.precision", "'auto', 'float32' or 'bfloat16'"),
        ("data.validation_fraction=1.5", "data.validation_fraction", "less than or equal to 1"),
        ("model.selection.pool=sum", "model.selection.pool", "'max', 'mean' or 'attention'"),
        ("model.selection.teacher_temperature=0", "model.selection.teacher_temperature", "got 0"),
        ("model.fusion.alpha=1.2", "model.fusion.alpha", "less than or equal to 1"),
        ("train.stages=[]", "train.stages", "at least 1 item"),
        ("evaluate.suites=[]", "evaluate.suites", "at least 1 item"),
        ("tracking.model_name=a/b", "tracking.model_name", "match pattern"),
        ("evaluate.suites=[strict, bleu]", "evaluate.suites.1", "'strict' or 'llava_med'"),
        ("evaluate.others=[{name: a/b, weights: w}]", "evaluate.others.0.name", "match pattern"),
        ("evaluate.tokenizer=word", "evaluate.tokenizer", "'char', 'jieba', 'model' or"),
        ("model.language.weights=null", "model.language.weights", "valid string"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, path: str, detail: str) -> None:
    message = refusal(override)
    assert message.startswith(f"{path}: ")
    assert detail in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.batch_size=10", "train.micro_batch_size=4", "train.num_workers=2"],
            "train: batch_size 10 must be a multiple of micro_batch_size 4 times num_workers 2",
        ),
        (
            ["data.validation_fraction=0.5", "data.test_fraction=0.6"],
            "data: validation_fraction 0.5 and test_fraction 0.6 must not exceed 1 together",
        ),
        (["train.stages.0.epochs=1"], "train.stages.0: give either steps or epochs"),
        (["train.stages.0.steps=null"], "train.stages.0: give either steps or epochs"),
        (
            ["train.stages.1.trainable=[lora, language]"],
            "train.stages.1: train lora or the whole language model, not both",
        ),
        (
            ["model.vision.encoders.1.name=clip"],
            "model.vision: encoders must differ, got ['clip', 'clip']",
        ),
        (
            ["model.vision.encoders=[{name: clip, weights: c, width: 3}]"],
            "train.stages.0.trainable: alpha weighs two encoders, model.vision.encoders names one",
        ),
        (
            ["encode.num_replicas=3", "encode.max_replicas=2"],
            "encode: max_replicas 2 is less than num_replicas 3",
        ),
        (
            ["evaluate.suites=[strict, strict]"],
            "evaluate: suites must differ, got ['strict', 'strict']",
        ),
        (
            ["evaluate.register_champion=true", "evaluate.reuse_predictions=true"],
            "evaluate: register_champion: answers that are reused may be another checkpoint's; "
            "leave reuse_predictions out",
        ),
        (
            ["evaluate.register_metric=em"],
            "evaluate: register_metric begins with strict/, llava_med/, selection/, got 'em'",
        ),
        (
            ["evaluate.register_champion=true", "tracking.model_name="],
            "evaluate.register_champion needs tracking.uri and tracking.model_name",
        ),
        (
            ["evaluate.others=[{name: a, weights: w}, {name: a, weights: v}]"],
            "evaluate: others must differ in name, got ['a', 'a']",
        ),
        (
            ["evaluate.others=[{name: a, weights: w, base_url: u}]"],
            "evaluate.others.0: a: give one of answers_uri, weights and base_url",
        ),
        (
            ["evaluate.others=[{name: a}]"],
            "evaluate.others.0: a: give one of answers_uri, weights and base_url",
        ),
        (
            ["evaluate.others=[{name: a, base_url: u}]"],
            "evaluate.others.0: a: base_url needs model, the name that it has there",
        ),
        (
            ["evaluate.others=[{name: constant, weights: w}]"],
            "evaluate.others.0: constant is the name of another row",
        ),
        (
            ["data.simulator.min_frames=9"],
            "data.simulator: min_frames 9 exceeds max_frames 5",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    assert refusal(*overrides) == message


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    raw = raw_config()
    del raw["model"]["language"]["weights"]
    assert refusal(name=write(tmp_path, raw)) == "model.language.weights: missing"


def test_every_mistake_gets_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load("tiny", ["train.num_workers=0", "data.seeed=1"])
    paths = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert sorted(paths) == ["data.seeed", "train.num_workers"]


def test_an_unknown_preset_names_the_known_ones() -> None:
    message = refusal(name="tinny")
    assert "'tinny'" in message
    assert all(name in message for name in preset_names())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: [1, 2", "is not YAML"),
        ("- a\n- b\n", "must hold a mapping, got list"),
        ("", "must hold a mapping, got NoneType"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = write(tmp_path, content)
    message = refusal(name=path)
    assert message.startswith(path)
    assert reason in message


def test_a_file_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert refusal(name=str(path)).startswith(f"{path} is not YAML")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refusal(name=str(path)) == f"no configuration file {path}"


def test_overrides_are_yaml_and_apply_in_order() -> None:
    config = load(
        "tiny",
        [
            "data.seed=1",
            "data.seed=2",
            "train.stages.1.learning_rate=1e-3",
            "train.stages.0.trainable=[projectors, alpha]",
            "model.language.lora.targets=[q_proj, v_proj]",
            "model.selection={strategy: first}",
            "evaluate.max_exams=null",
            "data.assume_deidentified=A. Name, 2026-11-22",
            "data.source_uri=s3://bucket/a=b",
            "tracking.uri=",
        ],
    )
    assert config.data.seed == 2
    assert config.train.stages[1].learning_rate == 0.001
    assert config.train.stages[0].trainable == ("projectors", "alpha")
    assert config.model.language.lora is not None
    assert config.model.language.lora.targets == ("q_proj", "v_proj")
    assert config.model.selection.strategy == "first"
    assert config.model.selection.teacher_warmup_steps == 120  # the section was replaced whole
    assert config.evaluate.max_exams is None
    assert config.data.assume_deidentified == "A. Name, 2026-11-22"
    assert config.data.source_uri == "s3://bucket/a=b"
    assert config.tracking.uri == ""


def test_a_section_of_nothing_can_be_filled() -> None:
    config = load("tiny", ["model.language.lora=null"])
    assert config.model.language.lora is None
    config = load("tiny", ["model.fusion.projector=mlp"])  # the preset has no section `fusion`
    assert config.model.fusion.projector == "mlp"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", "--set wants a.b=value, got 'train.seed'"),
        ("=3", "--set wants a.b=value, got '=3'"),
        ("train.seed=[1", "train.seed: '[1' is not YAML"),
        ("train.seed=2026-13-45", "train.seed: '2026-13-45' is not YAML"),
        ("train.stages.2.steps=1", "train.stages.2.steps: no key '2' to go through"),
        ("train.stages.first.steps=1", "train.stages.first.steps: no key 'first' to go through"),
        ("name.first=a", "name.first: no key 'first' to set"),
        ("train.stages.2=1", "train.stages.2: no key '2' to set"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override: str, message: str) -> None:
    assert refusal(override) == message


def test_root_and_name_are_filled_in_everywhere(tmp_path: Path) -> None:
    path = write(tmp_path, raw_config(data={"exams_uri": "{root}/a/b"}))
    config = load(path)
    assert config.root == "runs/small"
    assert config.data.exams_uri == "runs/small/a/b"
    assert config.data.quarantine_uri == "runs/small/quarantine"
    assert config.model.vision.encoders[0].weights == "runs/small/clip"
    assert config.tracking.uri == "sqlite:///runs/small/mlflow.db"
    moved = load(path, ["root=s3://bucket/{name}/", "name=large"])
    assert moved.root == "s3://bucket/large"
    assert moved.train.output_uri == "s3://bucket/large/train"


def test_yaml_gives_back_an_equal_tree() -> None:
    for name in preset_names():
        config = load(name, ["root=s3://bucket/超声", "data.assume_deidentified=李, 2026-11-22"])
        text = config.to_yaml()
        assert parse(yaml.safe_load(text)) == config
        assert "超声" in text  # readable, not escaped


def test_the_key_of_the_pseudonyms_is_written_nowhere() -> None:
    config = load("tiny", ["data.patient_key_secret=very-secret"])
    assert config.data.patient_key_secret == "very-secret"
    assert "secret" not in config.to_yaml()


def test_the_tree_is_frozen() -> None:
    config = load("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.train.num_workers = 2  # type: ignore[misc]


def test_visual_tokens_follow_from_the_grid() -> None:
    assert load("tiny").model.tokens_per_frame == 16
    assert load("llava-ultra-13b").model.tokens_per_frame == 256


def test_one_encoder_trains_without_alpha() -> None:
    config = load(
        "tiny",
        [
            "model.vision.encoders=[{name: clip, weights: c, width: 3}]",
            "train.stages.0.trainable=[projectors, scorer]",
            "train.stages.1.trainable=[projectors, scorer, lora]",
        ],
    )
    assert [encoder.name for encoder in config.model.vision.encoders] == ["clip"]


def test_gradient_accumulation_divides_the_batch() -> None:
    stages = [{"name": "align", "trainable": ["projectors"], "steps": 1}]
    train = TrainConfig.model_validate(
        {"stages": stages, "batch_size": 24, "micro_batch_size": 2, "num_workers": 3}
    )
    assert train.gradient_accumulation == 4


def test_the_paper_s_values_stand_in_its_preset() -> None:
    config = load("llava-ultra-13b")
    clip, sam = config.model.vision.encoders
    assert (config.model.vision.grid, clip.width, sam.width) == (224 // 14, 1024, 256 * 4 * 4)
    assert config.train.batch_size == 16
    assert config.train.num_workers == 4
    assert config.train.zero.stage == 3
    assert config.train.weight_decay == 0  # Adam, not AdamW
    assert {stage.learning_rate for stage in config.train.stages} == {1e-3}


def test_keys_beside_the_tree_are_refused() -> None:
    with pytest.raises(ConfigError, match="format: unknown key"):
        parse({**load("tiny").model_dump(mode="json"), "format": 1})


def test_a_tree_is_a_pipeline_config() -> None:
    assert isinstance(parse(raw_config()), PipelineConfig)


def test_auto_is_the_precision_that_the_hardware_has() -> None:
    settled = {
        precision: [
            load("tiny", [f"train.precision={precision}"])
            .train.settle_precision(has_bfloat16=has_it)
            .precision
            for has_it in (False, True)
        ]
        for precision in ("auto", "float32", "bfloat16")
    }
    assert settled == {
        "auto": ["float32", "bfloat16"],
        "float32": ["float32", "float32"],
        "bfloat16": ["bfloat16", "bfloat16"],
    }

"""The plan, against what small runs really keep, and against arithmetic by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ultra.__main__ import main
from ultra.config import PipelineConfig, StageConfig, load
from ultra.model.language import LanguageBranch, load_tokenizer
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.outline import outline_model
from ultra.model.trainable import count_parts, select_trainable
from ultra.train.footprint import Shape, measure, measure_both
from ultra.train.memory import Memory, plan_memory
from ultra.train.plan import Assumptions, Plan, make_plan
from ultra.train.plan_text import describe
from ultra.train.stage import build_teaching

TOLERANCE = 0.05
"""What the plan may be off by: it knows of no padding, and so of no mask."""

TINY_SHAPE = Shape(samples=3, pictures=4, tokens=90)
MEDIUM_SHAPE = Shape(samples=2, pictures=3, tokens=130)
MEDIUM = {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
"""34 million parameters."""


@pytest.fixture(autouse=True)
def _torch_s_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what ZeRO-3 does to this process: it puts its own linear layer in place of torch's."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def bytes_of(tensors: Iterable[Any]) -> int:
    """Of the tensors among some values, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, Tensor)
    }
    return sum(storages.values())


def make_batch(config: PipelineConfig, shape: Shape) -> dict[str, Any]:
    """Random inputs of a shape; the last row is shorter than the others, as in any batch."""
    generator = torch.Generator().manual_seed(1)
    vision = config.model.vision
    ids = torch.randint(3, 90, (shape.samples, shape.tokens), generator=generator)
    ids[:, 2 : 2 + vision.grid**2] = -1
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, -7:] = False
    labels = ids.clone()
    labels[:, : 2 + vision.grid**2] = -100
    return {
        "features": {
            e.name: torch.randn(
                shape.samples, shape.pictures, vision.grid**2, e.width, generator=generator
            ).half()
            for e in vision.encoders
        },
        "frame_mask_BK": torch.ones(shape.samples, shape.pictures, dtype=torch.bool),
        "input_ids_BS": ids,
        "labels_BS": labels.masked_fill(~mask, -100),
        "text_mask_BS": mask,
        "findings_ids_BS": ids[:, -5:],
        "findings_mask_BS": mask[:, -5:],
    }


def run_for_real(
    config: PipelineConfig, stage: StageConfig, model: LlavaUltra, shape: Shape
) -> dict[str, int]:
    """Take a step of a stage with DeepSpeed and return the bytes of what it holds."""
    from ultra.train.zero import ZeroEngine

    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = ZeroEngine(model, config.train, stage)
    inner = engine.engine.optimizer
    batch = make_batch(config, shape)
    model.train()
    again = 0
    if config.train.gradient_checkpointing:
        again = run_a_layer(engine, batch)
        model.language.base.gradient_checkpointing_enable({"use_reentrant": False})
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = engine(**batch)
    weights = [*model.parameters(), *(getattr(p, "ds_tensor", None) for p in model.parameters())]
    inputs = [*weights, *model.buffers(), *batch["features"].values()]
    others = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    activations = bytes_of(t for t in kept if t.untyped_storage().data_ptr() not in others)
    kept.clear()
    engine.backward(outputs["loss"])
    if config.train.zero.stage == 3:
        gradients = [inner.grad_partitions_flat_buffer]
    elif config.train.zero.stage == 0:
        gradients = [p.grad for p in model.parameters()]
    else:
        gradients = [t for part in inner.averaged_gradients.values() for t in part or ()]
        gradients += [p.grad for p in model.parameters()]
    found = {"weights": bytes_of(weights), "gradients": bytes_of(gradients)}
    engine.step()
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups")
    groups = [group for name in names for group in getattr(inner, name, ())]
    masters = [t for g in groups for t in (g if isinstance(g, list) else [g])]
    states = [v for s in getattr(inner, "optimizer", inner).state.values() for v in s.values()]
    moments = bytes_of(t for t in states if isinstance(t, Tensor) and t.numel() > 1)
    own = {t.untyped_storage().data_ptr() for t in weights if isinstance(t, Tensor)}
    copies = bytes_of(t for t in masters if t.untyped_storage().data_ptr() not in own)
    engine.close()
    return {**found, "optimizer": copies + moments, "activations": activations + again}


def run_a_layer(engine: Any, batch: dict[str, Any]) -> int:
    """Return the bytes that the last layer keeps beside its input; it is computed again at once."""
    layer = engine.model.language.layers[-1]
    kept: list[Tensor] = []
    inputs: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    watch = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def enter(_module: Any, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        inputs.extend(args)
        inputs.extend(options["position_embeddings"])
        watch.__enter__()

    hooks = [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(lambda *_: watch.__exit__(None, None, None)),
    ]
    engine(**batch)
    for hook in hooks:
        hook.remove()
    others = {t.untyped_storage().data_ptr() for t in [*inputs, *layer.parameters()]}
    return bytes_of(t for t in kept if t.untyped_storage().data_ptr() not in others)


def plan_alone(config: PipelineConfig, stage: StageConfig, shape: Shape) -> Memory:
    """What the plan says of the same step."""
    model = outline_model(config.model).to(getattr(torch, config.train.precision))
    select_trainable(model, stage.trainable)
    with torch.device("meta"):
        teaching = build_teaching(config, model, None)
    footprint = measure_both(model, teaching, shape)[config.train.gradient_checkpointing]
    return plan_memory(count_parts(model), config.train, config.train.zero.stage, footprint, 0)


def compare(config: PipelineConfig, stage: int, model: LlavaUltra, shape: Shape) -> None:
    chosen = config.train.stages[stage]
    planned = plan_alone(config, chosen, shape)
    real = run_for_real(config, chosen, model, shape)
    expected = {name: pytest.approx(value, rel=TOLERANCE) for name, value in real.items()}
    assert {name: getattr(planned, name) for name in real} == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1])
def test_the_tiny_preset_holds_what_was_planned(stage: int, zero: int, precision: str) -> None:
    config = load(
        "tiny",
        [
            f"train.zero.stage={zero}", f"train.precision={precision}", "train.num_workers=1",
            "train.batch_size=12",  # one forward pass a step
            "model.language.lora.dropout=0.1",
        ],
    )  # fmt: skip
    model = LlavaUltra(config.model, LanguageBranch(config.model.language))
    compare(config, stage, model, TINY_SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("zero", [2, 3])
def test_a_medium_model_holds_what_was_planned(
    zero: int, whole: bool, checkpointing: bool, random_backbones: Path, tmp_path: Path
) -> None:
    settings = LlamaConfig(**MEDIUM)
    settings.save_pretrained(tmp_path)
    trained = ["projectors", "alpha", "scorer", "language" if whole else "lora"]
    config = load(
        "tiny",
        [
            f"train.zero.stage={zero}", "train.num_workers=1", "train.batch_size=12",
            f"train.gradient_checkpointing={checkpointing}",
            f"model.language.weights={tmp_path}", f"train.stages.1.trainable={trained}",
            *(["model.language.lora=null"] if whole else []),
        ],
    )  # fmt: skip
    opened = LlamaForCausalLM(settings), load_tokenizer(random_backbones / "language")
    model = LlavaUltra(config.model, LanguageBranch(config.model.language, opened=opened))
    compare(config, 1, model, MEDIUM_SHAPE)


# Arithmetic


def make_assumptions(**changes: Any) -> Assumptions:
    return Assumptions(
        **{
            "exams": 1000,
            "frames": 5,
            "text_tokens": 40,
            "conversations": 1,
            "gpu_memory": 48.0,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def planned() -> Plan:
    """LLaVA-Ultra 13B as its preset has it, on 1,000 exams."""
    return make_plan(load("llava-ultra-13b"), make_assumptions())


def test_parameters_and_weights_of_13b(planned: Plan) -> None:
    llama, connector, lora = 13_015_864_320, 26_224_640 + 1 + 5120, 250_347_520
    align, instruct = planned.stages
    trained = [
        sum(part.parameters for part in stage.parts if part.trainable)
        for stage in (align, instruct)
    ]
    assert trained == [connector, connector + lora]
    for memory in instruct.memory:
        whole = 2 * (llama + connector + lora)
        assert memory.weights == (-(-whole // 4) if memory.zero == 3 else whole)
        trains = 2 * (connector + lora)
        assert memory.gradients == (-(-trains // 4) if memory.zero >= 2 else trains)
        adam = 12 * (connector + lora)
        assert memory.optimizer == (-(-adam // 4) if memory.zero else adam)
    # The embedding and a layer of LLaMA in bfloat16, of the second the norm and what gives queries
    # and keys, and the projectors with alpha in float32, as they were made.
    layer = 4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120
    second = 5120 + 2 * 5120**2
    snapshot = 2 * (32000 * 5120 + layer + second) + 4 * (26_224_640 + 1)
    assert instruct.memory[0].teacher == snapshot


def test_operations_of_13b_are_those_of_its_matrices(planned: Plan) -> None:
    """Two a multiplication: once for the forward pass, once for the inputs' gradient."""
    align, _ = planned.stages
    tokens = 256 + 40
    assert align.tokens == tokens
    matrices = 40 * (4 * 5120**2 + 3 * 5120 * 13824) + 32000 * 5120
    attention = 40 * (2 + 5) * tokens**2 * 5120
    projectors = 5 * 256 * 5120 * (1024 + 4096)  # those of their weights, of all five frames
    expected = 4 * (tokens * matrices + projectors) + 2 * attention  # LoRA, fresh, is left out
    assert align.steps < 120  # the teacher's warm-up
    assert align.flops == pytest.approx(expected, rel=0.002)


def test_conversations_share_the_visual_tokens_as_far_as_there_is_room() -> None:
    def tokens(conversations: int) -> list[int]:
        config = load("tiny", ["train.stages.1.conversations=all"])
        known = make_assumptions(conversations=conversations)
        return [stage.tokens for stage in make_plan(config, known).stages]

    assert tokens(6) == [16 + 40, 16 + 6 * 40]
    assert tokens(60) == [16 + 40, 16 + 12 * 40]  # a row has 512 at most


@pytest.mark.slow
def test_gradient_checkpointing_of_13b_is_in_its_operations_and_its_memory(planned: Plan) -> None:
    """The layers run again, without the last product of each: no backward pass reads it."""
    on = ["train.gradient_checkpointing=true"]
    (align, instruct), tokens = (
        make_plan(load("llava-ultra-13b", on), make_assumptions()).stages,
        296,
    )
    matrices = 40 * (4 * 5120**2 + 2 * 5120 * 13824)
    expected = 2 * tokens * matrices + 4 * 40 * tokens**2 * 5120
    assert align.flops - planned.stages[0].flops == pytest.approx(expected, rel=0.002)
    assert instruct.memory == instruct.checkpointed == planned.stages[1].checkpointed
    inputs = 40 * 2048 * 5120 * 2
    for plain, checkpointed in zip(planned.stages[1].memory, instruct.memory, strict=True):
        assert inputs < checkpointed.activations < 0.15 * plain.activations
        assert checkpointed.weights == plain.weights


def test_the_encoders_take_what_their_sizes_say(planned: Plan) -> None:
    """CLIP: 23 layers on 257 tokens. SAM: 24 on 4096, and its windows; by hand, 1.48 TMAC."""
    clip = 23 * (12 * 1024**2 * 257 + 2 * 257**2 * 1024) + 3 * 14**2 * 1024 * 256
    one = planned.encode_flops / 5
    assert one == pytest.approx(2 * clip + 2 * 1.48e12, rel=0.02)


def test_the_cache(planned: Plan) -> None:
    assert planned.frame_bytes == 256 * (1024 + 4096) * 2  # 2.5 MiB
    assert planned.cache_bytes == 1000 * 5 * planned.frame_bytes


def test_hours_follow_from_operations(planned: Plan) -> None:
    align, _ = planned.stages
    assert align.samples == 63 * 16  # 1,000 exams, the last step filled up
    rate = 4 * 312e12 * 0.35
    assert planned.stage_hours(align, cached=True) == pytest.approx(
        align.samples * align.flops / rate / 3600
    )
    uncached = align.samples * (align.flops + planned.encode_flops) / rate / 3600
    assert planned.stage_hours(align, cached=False) == pytest.approx(uncached)
    assert planned.encode_hours() == pytest.approx(1000 * planned.encode_flops / rate / 3600)


def test_utilisation_is_measured_in_the_steps_of_a_stage(planned: Plan) -> None:
    history = {"samples_per_second": [(63, 2.0), (64, 3.0), (126, 5.0), (127, 90.0)]}
    align, instruct = planned.stages
    peak = 4 * 312e12
    assert planned.measured_utilisation(align, history) == pytest.approx(2 * align.flops / peak)
    assert planned.measured_utilisation(instruct, history) == pytest.approx(
        4 * instruct.flops / peak
    )
    assert planned.measured_utilisation(align, {}) is None


def test_the_teacher_reads_every_frame_and_the_findings_up_to_the_second_layer() -> None:
    config = load("llava-ultra-7b")
    model = outline_model(config.model)
    with torch.device("meta"):
        teaching = build_teaching(config, model, None)
    taken = measure(model, teaching, Shape(samples=1, pictures=5, tokens=290, findings=40))
    layers = 4 * 4096**2 + 3 * 4096 * 11008 + 4096**2  # of the second, queries or keys
    attention = 2 * (5 * 257**2 + 40**2) * 4096
    projectors = 5 * 256 * (1024 + 4096) * 4096
    matching = 5 * 40 * 256 * 4096
    expected = 2 * (layers * (40 + 5 * 257) + attention + projectors + matching)
    assert taken.teacher_flops == pytest.approx(expected, rel=0.005)


def test_the_teacher_counts_from_the_end_of_its_warm_up() -> None:
    flops = {}
    for warmup in (0, 15, 60):
        overrides = [
            f"model.selection.teacher_warmup_steps={warmup}", "model.language.max_length=60",
            "data.max_frames=2",
        ]  # fmt: skip
        flops[warmup] = make_plan(load("tiny", overrides), make_assumptions()).stages[0].flops
    assert flops[15] == pytest.approx(flops[60] + (flops[0] - flops[60]) * 45 / 60)
    assert flops[0] > 1.5 * flops[60]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "tokens", "pictures"),
    [("each", 5 * (256 + 40), 5), ("all", 5 * 256 + 40, 5), ("composite", 256 + 40, 1)],
)
def test_a_strategy_shows_and_encodes_as_in_training(
    strategy: str, tokens: int, pictures: int
) -> None:
    config = load("llava-med-7b", [f"model.selection.strategy={strategy}", "data.max_frames=5"])
    made = make_plan(config, make_assumptions())
    assert {stage.tokens for stage in made.stages} == {tokens}
    assert made.longest.pictures == pictures
    assert made.cache_bytes == 1000 * pictures * 256 * 1024 * 2


def test_an_offloaded_optimizer_is_not_on_the_gpu() -> None:
    config = load("llava-med-7b", ["train.zero.offload=cpu"])
    memory = make_plan(config, make_assumptions()).stages[1].memory
    assert [m.optimizer == 0 for m in memory] == [False, True, True, True]


# Text, JSON and the command line


def test_the_text_says_what_does_not_fit(planned: Plan) -> None:
    lines = describe(planned, {"samples_per_second": [(1, 2.0)]}).splitlines()
    zero = {line.split()[0]: line for line in lines if line.startswith("  ZeRO-")}
    total = planned.stages[1].checkpointed[1].total / 2**30
    suggestion = f"train.gradient_checkpointing makes it {total:.2f}"
    assert zero["ZeRO-1"].endswith(f"does not fit 48 GiB under ZeRO-1, {suggestion}")
    assert zero["ZeRO-3"].endswith("configured")
    assert any("alpha 1, scorer 5,120" in line for line in lines if "trains" in line)
    measured = 2 * planned.stages[0].flops / (4 * 312e12)
    (align, instruct) = (line for line in lines if "utilisation" in line)
    assert align.endswith(f"measured in the last run: {measured:.1%}")
    assert instruct.endswith("measured in the last run: none")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.precision=auto"], "float32 (what auto is without GPUs)"),
        (["train.precision=auto", "train.gpus_per_worker=1"], "bfloat16 (what auto is on GPUs th"),
        (["train.precision=bfloat16"], "bfloat16"),
    ],
)
def test_the_plan_says_which_precision_it_assumes(overrides: list[str], said: str) -> None:
    small = ["model.language.max_length=60", "data.max_frames=2"]
    made = make_plan(load("tiny", [*small, *overrides]), make_assumptions())
    assert f"ZeRO-2, {said}" in describe(made, {}).splitlines()[0]
    width = 4 if made.precision == "float32" else 2
    assert made.stages[0].memory[0].weights == width * sum(
        part.parameters for part in made.stages[0].parts
    )


def test_gradient_checkpointing_is_suggested_only_where_it_is_enough() -> None:
    small = ["model.language.max_length=60", "data.max_frames=2"]
    plain = make_plan(load("tiny", small), make_assumptions())
    checkpointed = plain.stages[1].checkpointed[2].total / 2**30
    for enough, memory in ((True, 1.001), (False, 0.999)):
        lines = describe(
            make_plan(load("tiny", small), make_assumptions(gpu_memory=memory * checkpointed)), {}
        ).splitlines()
        line = [line for line in lines if line.startswith("  ZeRO-2")][-1]
        assert "does not fit" in line
        assert ("train.gradient_checkpointing" in line) == enough


def run_plan(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["plan", "--config", "tiny", "--set", "tracking.uri=", *args])
    return capsys.readouterr().out


def test_the_command_prints_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--workers", "1", "--exams", "96", "--gpu-memory", "2")
    made = json.loads(run_plan(capsys, *args, "--json"))
    assert made["workers"] == 1
    assert [stage["name"] for stage in made["stages"]] == ["align", "instruct"]
    for stage in made["stages"]:
        for memory in stage["memory"] + stage["checkpointed"]:
            assert memory["fits"] == (memory["total"] <= 2 * 2**30)
    shown = run_plan(capsys, *args)
    total = made["stages"][1]["memory"][2]["total"] / 2**30
    line = [line for line in shown.splitlines() if line.startswith("  ZeRO-2")][-1]
    assert line.split()[10] == f"{total:.2f}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--exams", "0"], "--exams must be above 0, got 0"),
        (["--utilisation=-1"], "--utilisation must be above 0, got -1.0"),
        (["--workers", "5"], "batch_size 24 must be a multiple of micro_batch_size 12 times"),
        (["--set", "model.language.weights=nowhere"], "model.language: nothing to read at nowhere"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *args])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1

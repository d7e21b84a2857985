"""DeepSpeed ZeRO: the engine that takes steps, and whole tensors out of and into it by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from ultra.config import Part, StageConfig, TrainConfig
from ultra.model.checkpoint import CONNECTOR, Moments
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.trainable import select_trainable

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """A model in a DeepSpeed engine, for one stage; the process group must be up.

    Load the weights before: what goes in afterwards reaches the optimizer's copies only.

    Args:
        model: gets the type that the configuration computes in.
        config: with a precision that is settled.
        stage: names what trains.
    """

    def __init__(self, model: LlavaUltra, config: TrainConfig, stage: StageConfig) -> None:
        self.trained = select_trainable(model, stage.trainable)
        self.precision = config.precision
        self.model = model.to(getattr(torch, config.precision))
        groups = [_group(model, part, names, config) for part, names in self.trained.items()]
        optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate)
        # On CPUs DeepSpeed would compile an operator of its own for reductions within a machine,
        # with whatever compiler there is; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_deepspeed_config(config)
        )
        self.device = self.engine.device
        self.partitioned = config.zero.stage == 3

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Return the model's outputs."""
        outputs: dict[str, Tensor] = self.engine(**inputs)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one forward pass."""
        self.engine.backward(loss)

    def step(self) -> None:
        """Count a forward pass; DeepSpeed moves the parameters at the last of a step."""
        self.engine.step()

    def set_learning_rate(self, rate: float) -> None:
        """Set the base rate; a group's `scale` multiplies it."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def alpha(self) -> float | None:
        """Return the fusion's alpha as it stands, on every worker."""
        parameter = self.model.fusion.alpha
        if parameter is None:
            return None
        with self.gather([parameter]):
            return float(parameter.detach()[0])

    def gather(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Return a context in which the parameters are whole; every worker must enter it."""
        if not self.partitioned:
            return nullcontext()
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
        return context

    def weights(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: connector, LoRA, and all else that trains, whole.

        Every worker must call it and gets the same.
        """
        trains_language = "language" in self.trained
        kept = {}
        for name, parameter in self.model.named_parameters():
            if name.startswith(CONNECTOR) or ".lora_" in name or trains_language:
                with self.gather([parameter]):
                    kept[name] = parameter.detach().cpu().clone()
        return kept

    def moments(self) -> Moments:
        """Return masters and moments of what trains, whole, by name; every worker must call it."""
        self._link_states()
        masters, first, second = {}, {}, {}
        for name, parameter in self._trained_parameters():
            masters[name] = self._master(parameter).cpu().clone()
            first[name] = self._moment(parameter, "exp_avg").cpu().clone()
            second[name] = self._moment(parameter, "exp_avg_sq").cpu().clone()
        return Moments(masters, first, second)

    def restore(self, moments: Moments, steps: int) -> None:
        """Set masters and moments, and the number of steps the optimizer counts from.

        Raises:
            ValueError: when the moments are not those of exactly the trained parameters.
        """
        trained = dict(self._trained_parameters())
        if trained.keys() != moments.masters.keys():
            different = sorted(trained.keys() ^ moments.masters.keys())
            raise ValueError(f"the optimizer state is of other parameters, e.g. {different[0]}")
        self._link_states()
        for name, parameter in trained.items():
            if self._is_plain():
                state = self.engine.optimizer.state[parameter]
                parameter.data.copy_(moments.masters[name])
                for kind in MOMENTS:
                    state[kind] = getattr(moments, kind)[name].to(parameter.device).clone()
                state["step"] = torch.tensor(float(steps))
            elif self.partitioned:
                safe_set_local_fp32_param(parameter, self._own_part(moments.masters[name]))
                for kind in MOMENTS:
                    part = self._own_part(getattr(moments, kind)[name])
                    safe_set_local_optimizer_state(parameter, part, kind)
            else:
                safe_set_full_fp32_param(parameter, moments.masters[name].to(self.device))
                for kind in MOMENTS:
                    value = getattr(moments, kind)[name].to(self.device)
                    safe_set_full_optimizer_state(parameter, value, kind)
        if not self._is_plain():
            for state in self.engine.optimizer.optimizer.state.values():
                state["step"] = torch.as_tensor(float(steps))

    def close(self) -> None:
        """Let go of the engine and its hooks."""
        self.engine.destroy()

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        trained = {name for names in self.trained.values() for name in names}
        return ((n, p) for n, p in self.model.named_parameters() if n in trained)

    def _link_states(self) -> None:
        # Moments are made at the first step; a resumed engine needs them before. ZeRO 1 and 2
        # moreover show them to the parameters of the first group only.
        if self._is_plain():
            return
        optimizer = self.engine.optimizer
        name = (
            "fp32_partitioned_groups_flat"
            if self.partitioned
            else ("single_partition_of_fp32_groups")
        )
        for flat in getattr(optimizer, name):
            state = optimizer.optimizer.state[flat]
            if not state:
                state["step"] = torch.tensor(0.0)
                state.update({kind: torch.zeros_like(flat) for kind in MOMENTS})
        if not self.partitioned:
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _own_part(self, tensor: Tensor) -> Tensor:
        # ZeRO-3's setter of whole tensors fails where the workers do not divide their size.
        flat = tensor.to(self.device).flatten()
        flat = nn.functional.pad(flat, (0, -flat.numel() % self.engine.world_size))
        part: Tensor = flat.chunk(self.engine.world_size)[self.engine.global_rank]
        return part

    def _is_plain(self) -> bool:
        # ZeRO-0 in float32 is the torch optimizer itself, without masters of its own.
        return isinstance(self.engine.optimizer, torch.optim.Optimizer)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if self._is_plain():
            return parameter.detach()
        return _whole(safe_get_full_fp32_param(parameter))

    def _moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self._is_plain():
            state: Mapping[str, Tensor] = self.engine.optimizer.state.get(parameter, {})
            return state[kind] if kind in state else torch.zeros_like(parameter)
        return _whole(safe_get_full_optimizer_state(parameter, kind))


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "DeepSpeed keeps no float32 state for a trained parameter"
    return tensor


def _group(model: nn.Module, part: Part, names: list[str], config: TrainConfig) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    return {
        "params": [parameters[name] for name in names],
        "scale": config.learning_rate_scales.get(part, 1.0),
        # alpha is a mixing weight: decay would pull it to the second encoder.
        "weight_decay": 0.0 if part in {"alpha", "scorer"} else config.weight_decay,
    }


def _deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.stage == 3:
        zero["stage3_param_persistence_threshold"] = 10_000
    if config.zero.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }

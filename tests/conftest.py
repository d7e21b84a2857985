"""Fixtures shared by all tests; the only place that starts Ray or a server."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.seaweedfs import SeaweedFS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors as small as those of tests are slower on several threads."""
    import torch

    torch.set_num_threads(1)


def free_port() -> int:
    """A port that nobody uses, below those the system and Ray hand out in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port


def wait_until_up(url: str, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    """Return once the address answers at all; fail when the process ends or time runs out."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)


@pytest.fixture(scope="session")
def s3_environment() -> dict[str, str]:
    """The AWS_* variables of the test server, set before Ray starts so that its workers know it."""
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "ultra",
        "AWS_SECRET_ACCESS_KEY": "ultra-secret",
        "AWS_REGION": "us-east-1",
    }
    os.environ.update(variables)
    return variables


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: dict[str, str]) -> Iterator[None]:
    """A small local Ray cluster for the whole session."""
    import ray

    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # 5 are few on a busy machine
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "ultra.serve.gateway:middlewares"
    ray.init(
        address="local",
        num_cpus=6,  # a whole one for every replica of two models
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(
    s3_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SeaweedFS]:
    """A real S3 server (SeaweedFS)."""
    from tests.seaweedfs import SeaweedFS

    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"), s3_environment)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def s3_bucket(s3_server: SeaweedFS) -> str:
    """The address of a bucket that is empty at first."""
    return s3_server.make_bucket("ultra-test")


CHARACTERS = (
    "".join(chr(c) for c in range(32, 127))
    + "\n。，：；、？问答肝胆脾肾左右叶见囊肿结节超声所提示大小约边界清欠是否正常"
)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server that hands artifacts on."""
    folder = tmp_path_factory.mktemp("mlflow_server")
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ
            | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/health", process, timeout_s=240)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the workers it started
        process.wait(timeout=30)


def write_random_backbones(folder: Path, seed: int = 0) -> None:
    """Write clip/, sam.pth and language/ with random tiny weights, as the real ones are laid out.

    The sizes differ pairwise: a grid of 2 x 2, 20 clip and 5 (unshuffled 20) sam channels, D = 24.
    """
    import torch
    from segment_anything.modeling import ImageEncoderViT
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(seed)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=20,
            intermediate_size=28,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    ).save_pretrained(folder / "clip")
    sam = ImageEncoderViT(
        img_size=32,
        patch_size=8,
        embed_dim=12,
        depth=3,
        num_heads=3,
        out_chans=9,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    torch.save({f"image_encoder.{k}": v for k, v in sam.state_dict().items()}, folder / "sam.pth")
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *sorted(set(CHARACTERS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    from tokenizers import decoders

    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "language")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder / "language")


@pytest.fixture(scope="session")
def random_backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    write_random_backbones(folder)
    return folder


@pytest.fixture(scope="session")
def random_config(random_backbones: Path):  # type: ignore[no-untyped-def]
    """A whole configuration on the random backbones."""
    from ultra.config import parse

    return parse(
        {
            "name": "random",
            "root": "runs/random",
            "model": {
                "vision": {
                    "grid": 2,
                    "encoders": [
                        {"name": "clip", "weights": str(random_backbones / "clip"), "width": 20},
                        {"name": "sam", "weights": str(random_backbones / "sam.pth"), "width": 36},
                    ],
                },
                "selection": {"teacher_warmup_steps": 2},
                "language": {"weights": str(random_backbones / "language"), "max_length": 400},
            },
            "train": {
                "stages": [
                    {"name": "align", "trainable": ["projectors", "alpha", "scorer"], "steps": 3},
                    {
                        "name": "instruct",
                        "trainable": ["projectors", "alpha", "scorer", "lora"],
                        "steps": 3,
                    },
                ],
                "batch_size": 4,
                "micro_batch_size": 2,
            },
            "tracking": {"uri": ""},
        }
    )


@pytest.fixture(scope="session")
def random_checkpoint(random_config, tmp_path_factory: pytest.TempPathFactory) -> str:  # type: ignore[no-untyped-def]
    """The address of a checkpoint of a model that never trained."""
    import torch

    from ultra.model import checkpoint
    from ultra.model.language import LanguageBranch
    from ultra.model.llava_ultra import LlavaUltra

    torch.manual_seed(1)
    model = LlavaUltra(random_config.model, LanguageBranch(random_config.model.language))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)  # a LoRA that changes the answers
    weights = {
        n: p
        for n, p in model.named_parameters()
        if n.startswith(checkpoint.CONNECTOR) or ".lora_" in n
    }
    folder = tmp_path_factory.mktemp("checkpoint")
    base = checkpoint.describe_base(random_config.model)
    checkpoint.write(folder, random_config, weights, model.language, base)
    return str(folder)

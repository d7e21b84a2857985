"""What the benchmarks of the endpoint stand on: a model, a Ray head that serves it, and clients."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml
from PIL import Image

from ray_jobs.demo import PROJECT, free_port, ray_head, tool
from ray_jobs.demo_server import wait_until_ready
from ultra.config import load
from ultra.model import checkpoint
from ultra.model.language import LanguageBranch, load_tokenizer
from ultra.model.llava_ultra import LlavaUltra

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("ray", "torch", "transformers", "peft", "fastapi", "httpx")
QUESTIONS = ("病变是什么？", "病变的大小是多少？", "边界清晰吗？", "请描述超声所见。")
REPLICAS = ("Ingress", "EncoderReplica", "LanguageReplica")


def make_language(folder: Path, width: int, layers: int) -> Path:
    """Write a random LLaMA, float32, with the tiny tokenizer, and return its folder.

    What it says is noise, and never ends by itself: the end token cannot win.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer(PROJECT / "ultra" / "presets" / "tiny" / "language")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight[tokenizer.eos_token_id])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_checkpoint(folder: Path, *, width: int = 256, layers: int = 6) -> str:
    """Write a checkpoint of the tiny encoders and a random LLaMA, and return its address."""
    language = make_language(folder / "language", width, layers)
    settings = [f"model.language.weights={language}", "model.language.max_length=1536"]
    tree = load("tiny", [f"root={folder}", *settings])
    whole = LlavaUltra(tree.model, LanguageBranch(tree.model.language))
    weights = {
        name: tensor
        for name, tensor in whole.named_parameters()
        if name.startswith(checkpoint.CONNECTOR) or ".lora_" in name
    }
    target = folder / "checkpoint"
    target.mkdir()
    checkpoint.write(target, tree, weights, whole.language, checkpoint.describe_base(tree.model))
    return str(target)


@dataclass(frozen=True, slots=True)
class Stand:
    """A served model.

    Attributes:
        url: of the endpoint.
        dashboard: of the Ray head.
        config: the serve_config.yaml that was deployed.
        environment: in which Ray's programs reach the head.
    """

    url: str
    dashboard: str
    config: dict[str, Any]
    environment: Mapping[str, str]

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Deploy a configuration, or update to it; returns before it has taken effect."""
        path = Path(self.environment["ULTRA_STAND"]) / "serve_config.yaml"
        path.write_text(yaml.safe_dump(dict(config), allow_unicode=True))
        command = [tool("serve"), "deploy", "--address", self.dashboard, str(path)]
        subprocess.run(
            command, env=dict(self.environment), cwd=PROJECT, check=True, capture_output=True
        )

    def replicas(self) -> dict[str, dict[str, int]]:
        """Return deployment -> name -> process id of the replicas that run."""
        token = self.environment["RAY_AUTH_TOKEN"]
        reply = httpx.get(
            f"{self.dashboard}/api/serve/applications/",
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
        )
        deployments = reply.raise_for_status().json()["applications"]["ultra"]["deployments"]
        return {
            name: {r["replica_id"]: r["pid"] for r in d["replicas"] if r["state"] == "RUNNING"}
            for name, d in deployments.items()
        }

    def count_in_logs(self, text: str) -> int:
        """Return how often a text stands in the head's logs."""
        files = Path(self.environment["ULTRA_RAY_LOGS"]).rglob("*")
        return sum(file.read_text(errors="replace").count(text) for file in files if file.is_file())


@contextmanager
def serving(
    folder: Path,
    checkpoint_uri: str,
    *,
    args: Mapping[str, Any] | None = None,
    deployments: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Stand]:
    """Serve a checkpoint by serve_config.yaml, with changes, on a Ray head of its own.

    Args:
        folder: for logs and the configuration.
        checkpoint_uri: what is served.
        args: of the application, in place of those of the file.
        deployments: name -> options in place of those of the file; None takes one away.
    """
    config = yaml.safe_load((PROJECT / "serve_config.yaml").read_text(encoding="utf-8"))
    port = free_port()
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] |= {"models": {"ultra": checkpoint_uri}, **(args or {})}
    for deployment in application["deployments"]:
        changed = {**deployment, **(deployments or {}).get(deployment["name"], {})}
        deployment.clear()
        deployment.update({key: value for key, value in changed.items() if value is not None})
        # Replicas share the few cores there are, whatever a cluster would give them.
        deployment["ray_actor_options"] = {"num_cpus": 0.05}
    with ray_head(folder / "ray.log") as environment:
        environment |= {"ULTRA_STAND": str(folder)}
        dashboard = environment["RAY_API_SERVER_ADDRESS"]
        stand = Stand(f"http://127.0.0.1:{port}", dashboard, config, environment)
        stand.deploy(config)
        wait_until_ready(stand.url, threading.Event())
        yield stand


def make_frames(count: int, seed: int, side: int = 128) -> tuple[bytes, ...]:
    """Return so many PNG frames of noise, the same for the same seed."""
    frames = []
    for number in range(count):
        pixels = np.random.default_rng([seed, number]).integers(0, 255, (side // 8, side // 8))
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).resize((side, side)).save(buffer, "PNG")
        frames.append(buffer.getvalue())
    return tuple(frames)


def make_question(
    exam: int, *, text: str = QUESTIONS[0], num_frames: int = 4, **fields: Any
) -> dict[str, Any]:
    """Return the body of a chat request about an exam that its number makes."""
    urls = [
        f"data:image/png;base64,{base64.b64encode(frame).decode()}"
        for frame in make_frames(num_frames, exam)
    ]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    content = [*parts, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return {"model": "ultra", "messages": messages, **fields}


@dataclass(slots=True)
class Reply:
    """What came back, and when.

    Attributes:
        status: of HTTP; 0 where there was no response.
        error: what went wrong after that, such as a stream cut short; empty when nothing did.
        first_s: seconds until the first text.
        gaps_s: seconds between one piece of text and the next.
    """

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    ultra: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    first_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)

    @property
    def content(self) -> tuple[Any, ...]:
        """What must be the same whoever answers: everything but names, times and caches."""
        scores = tuple(round(score, 4) for score in self.ultra.get("scores", ()))
        tokens = self.usage.get("prompt_tokens"), self.usage.get("completion_tokens")
        return self.text, self.finish_reason, *tokens, self.ultra.get("chosen_frame"), scores


async def ask(client: httpx.AsyncClient, question: Mapping[str, Any]) -> Reply:
    """Return the reply to a chat request; a streamed one is read as it comes."""
    reply, start = Reply(), time.perf_counter()
    try:
        if question.get("stream"):
            await _read_stream(client, question, reply, start)
        else:
            response = await client.post("/v1/chat/completions", json=question)
            reply.status, reply.headers = response.status_code, response.headers
            if reply.status == 200:
                body = response.json()
                choice = body["choices"][0]
                reply.text, reply.finish_reason = (
                    choice["message"]["content"],
                    choice["finish_reason"],
                )
                reply.usage, reply.ultra = body["usage"], body["ultra"]
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        reply.error = type(error).__name__
    reply.total_s = time.perf_counter() - start
    return reply


async def _read_stream(
    client: httpx.AsyncClient, question: Mapping[str, Any], reply: Reply, start: float
) -> None:
    body = {**question, "stream_options": {"include_usage": True}}
    is_done, last = False, start
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        reply.status, reply.headers = response.status_code, response.headers
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                reply.error = event["error"]["message"]
                continue
            reply.ultra = event.get("ultra") or reply.ultra
            reply.usage = event.get("usage") or reply.usage
            for choice in event["choices"]:
                reply.finish_reason = choice["finish_reason"] or reply.finish_reason
                if text := choice["delta"].get("content"):
                    now = time.perf_counter()
                    if reply.text:
                        reply.gaps_s.append(now - last)
                    else:
                        reply.first_s = now - start
                    reply.text, last = reply.text + text, now
    if reply.status == 200 and not is_done and not reply.error:
        reply.error = "cut short"


async def ask_all(
    url: str, questions: Sequence[Mapping[str, Any]], concurrency: int
) -> list[Reply]:
    """Return the replies to all questions, so many asked at a time, in their order."""
    places = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def ask_one(question: Mapping[str, Any]) -> Reply:
            async with places:
                return await ask(client, question)

        return await asyncio.gather(*map(ask_one, questions))


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, least and largest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def percentiles(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return the 50th and the 99th percentile."""
    if not values:
        return {}
    return {f"p{p}": round(float(np.percentile(values, p)), digits) for p in (50, 99)}


def _arguments() -> list[str]:
    """Return those of the command, files by their names alone."""
    return [Path(argument).name for argument in sys.argv[1:]]


def write_result(name: str, result: Mapping[str, Any], headline: Mapping[str, Any]) -> None:
    """Keep a result in benchmarks/results and print the one line that matters."""
    whole = {
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *_arguments()]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(whole, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": name, **headline}, ensure_ascii=False))

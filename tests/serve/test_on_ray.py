"""The endpoint on Ray Serve, asked by OpenAI's own client over HTTP."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from tests.conftest import ROOT, free_port
from tests.serve.questions import (
    CANARIES,
    CANARY_IMAGE,
    FRAMES,
    ask_user,
    encode_image,
    find_canaries,
)
from ultra.config import ConfigError, load
from ultra.data.prompts import encode_prompt
from ultra.model import checkpoint
from ultra.model.generation import Generator, Request
from ultra.registry import register
from ultra.serve.security import digest_key
from ultra.tracking import open_run
from ultra.types import Turn

KEY = "a-key-of-the-test"
DRAWN = {"temperature": 1.3, "top_p": 0.9}
SEEDS = (0, -5, 2**62)


def register_version(checkpoint: str, folder: Path) -> str:
    """Make a checkpoint the challenger of the model `served` and return MLflow's address."""
    uri = f"sqlite:///{folder}/mlflow.db"
    config = load("tiny", [f"tracking.uri={uri}", "tracking.model_name=served"])
    with open_run(config, "train") as tracker:
        register(config.tracking, tracker.run_id, checkpoint)
    return uri


def test_a_version_that_is_not_there_is_not_served(tmp_path: Path, monkeypatch) -> None:
    from ultra.serve import on_ray

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(ConfigError, match=r"models:/served@champion: no MLflow at 'sqlite:"):
        on_ray.build_app({"models": {"ultra": "models:/served@champion"}})


@pytest.fixture(scope="module")
def address(ray_cluster, random_checkpoint, tmp_path_factory) -> Iterator[str]:
    from ray import serve

    from ultra.serve import on_ray

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# two keys\n{digest_key('another')}\n{digest_key(KEY)} of the test\n")
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {
        "models": {"ultra-random": random_checkpoint, "second": "models:/served@challenger"},
        "tracking_uri": register_version(random_checkpoint, tmp_path_factory.mktemp("mlflow")),
        "max_frames": 4,
        "max_image_mib": 1,
        "max_new_tokens": 200,
        "api_keys_file": str(keys),
    }
    with pytest.MonkeyPatch.context() as patch:  # a queue that a test can fill
        patch.setattr(
            on_ray, "EncoderReplica", on_ray.EncoderReplica.options(max_queued_requests=8)
        )
        serve.run(on_ray.build_app(args), name="ultra")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def expected(random_checkpoint) -> dict:
    """What the model answers without any endpoint."""
    visual = checkpoint.load_visual(random_checkpoint).look([FRAMES])[0]
    language = checkpoint.load_language(random_checkpoint)
    turns = [Turn("user", "左叶见囊肿？")]
    prompt = encode_prompt(language.tokenizer, "plain", turns, len(visual.tokens_TD))
    request = Request(prompt, visual.tokens_TD, "x", 40)
    requests = [request, *(replace(request, **DRAWN, seed=seed) for seed in SEEDS)]
    with Generator(language, tokens_per_frame=4) as generator:
        answer, *drawn = generator.generate(requests)
    text, *drawn_texts = (
        language.tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in (answer, *drawn)
    )
    return {
        "visual": visual, "prompt": prompt, "answer": answer, "text": text, "drawn": drawn_texts,
    }  # fmt: skip


def ask(client, **changes):
    question = {
        "model": "ultra-random",
        "messages": [ask_user("左叶见囊肿？", *FRAMES)],
        "max_tokens": 40,
        **changes,
    }
    return client.chat.completions.create(**question)


def test_a_frame_group_as_predicted(client, expected) -> None:
    completion = ask(client)
    assert completion.choices[0].message.content == expected["text"]
    assert completion.choices[0].finish_reason == expected["answer"].finish_reason
    assert completion.usage.prompt_tokens == len(expected["prompt"])
    assert completion.usage.completion_tokens == len(expected["answer"].token_ids)
    ultra = completion.ultra
    assert ultra["chosen_frame"] == expected["visual"].chosen
    assert ultra["scores"] == pytest.approx(expected["visual"].scores_K, abs=1e-4)
    assert ultra["num_near_duplicates"] == 0
    assert ultra["replicas"].keys() == {"encoder", "language"}
    assert all(ultra["replicas"].values())


def test_another_model_has_replicas_of_its_own(client, expected) -> None:
    first, second = ask(client), ask(client, model="second")
    assert second.model == "second"
    assert second.choices[0].message.content == expected["text"]  # the same checkpoint, here
    for part in ("encoder", "language"):
        assert first.ultra["replicas"][part] != second.ultra["replicas"][part]


def test_streamed_it_is_the_same(client, expected) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == expected["text"]
    assert len([t for t in texts if t]) > 5  # as it comes, not all at once
    assert chunks[0].ultra["chosen_frame"] == expected["visual"].chosen
    assert chunks[-2].choices[0].finish_reason == expected["answer"].finish_reason
    assert chunks[-1].usage.completion_tokens == len(expected["answer"].token_ids)


def test_frames_are_batched_across_requests_and_remembered(address, client) -> None:
    from ray import serve

    encoder = serve.get_deployment_handle("EncoderReplica", "ultra")
    groups = [[encode_image(1000 + 100 * i + k) for k in range(1 + i % 4)] for i in range(6)]
    questions = [{"messages": [ask_user("大小？", *frames)]} for frames in groups]
    before = encoder.batch_sizes.remote().result()
    first = [c.ultra for c in ask_at_once(address, questions)]
    after = encoder.batch_sizes.remote().result()
    new = {size: count - before.get(size, 0) for size, count in after.items()}
    assert sum(size * count for size, count in new.items()) == sum(map(len, groups))
    assert sum(new.values()) < len(groups)
    again = [c.ultra for c in ask_at_once(address, questions)]
    assert encoder.batch_sizes.remote().result() == after
    for ultra, same, frames in zip(first, again, groups, strict=True):
        assert (ultra["num_cached_frames"], same["num_cached_frames"]) == (0, len(frames))
        assert (ultra["chosen_frame"], ultra["scores"]) == (same["chosen_frame"], same["scores"])


def test_a_follow_up_finds_its_prompt_in_the_cache(client) -> None:
    message = ask_user("左叶见囊肿？请描述大小和边界。" * 4, encode_image(71), encode_image(72))
    first = ask(client, messages=[message])
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    messages = [message, answer, {"role": "user", "content": "大小？"}]
    second = ask(client, messages=messages, max_tokens=8)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 16 < cached < second.usage.prompt_tokens
    assert second.ultra["replicas"] == first.ultra["replicas"]


def ask_at_once(address: str, questions: list[dict]) -> list:
    async def ask_all() -> list:
        async with openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key=KEY, max_retries=0
        ) as several:
            return await asyncio.gather(
                *(ask(several, **question) for question in questions), return_exceptions=True
            )

    return asyncio.run(ask_all())


def test_many_at_once(address, expected) -> None:
    seeds = [None, *SEEDS, None, *SEEDS]  # greedy ones between sampled ones
    questions = [{} if seed is None else {**DRAWN, "seed": seed} for seed in seeds]
    texts = [expected["text"], *expected["drawn"]] * 2
    for completion, text in zip(ask_at_once(address, questions), texts, strict=True):
        assert completion.choices[0].message.content == text


def test_too_many_at_once_are_sent_away(address, expected) -> None:
    outcomes = ask_at_once(address, [{}] * 40)
    refused = [o for o in outcomes if isinstance(o, openai.RateLimitError)]
    answered = [o for o in outcomes if not isinstance(o, Exception)]
    assert refused
    assert len(answered) >= 8
    assert len(refused) + len(answered) == 40
    assert refused[0].response.headers["retry-after"] == "5"
    assert refused[0].body["type"] == "rate_limit_error"
    assert {c.choices[0].message.content for c in answered} == {expected["text"]}


def test_a_follow_up_question(client, expected) -> None:
    messages = [
        {"role": "system", "content": "肝"},
        ask_user("左叶见囊肿？", *FRAMES),
        {"role": "assistant", "content": "见"},
        {"role": "user", "content": "大小？"},
    ]
    assert ask(client, messages=messages).usage.prompt_tokens > len(expected["prompt"])
    # Frames that come later are what is spoken of; those before are not even decoded.
    messages[1] = ask_user("左叶见囊肿？", b"no image")
    messages[3] = ask_user("大小？", FRAMES[2], FRAMES[2])
    ultra = ask(client, messages=messages).ultra
    assert len(ultra["scores"]) == 2
    assert ultra["num_near_duplicates"] == 1


def read_stream(chunks) -> tuple[list[str], str, int]:
    """The pieces of a streamed answer, why it ended, and its tokens."""
    *chunks, last, usage = chunks
    pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    return pieces, last.choices[0].finish_reason, usage.usage.completion_tokens


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def test_a_seed_draws_the_same_answer_again(client, expected) -> None:
    assert len({expected["text"], *expected["drawn"]}) == 1 + len(SEEDS)
    for seed, text in zip(SEEDS, expected["drawn"], strict=True):
        assert ask(client, **DRAWN, seed=seed).choices[0].message.content == text
        pieces, *_ = read_stream(ask(client, **DRAWN, seed=seed, **STREAMED))
        assert "".join(pieces) == text
    fresh = {ask(client, **DRAWN).choices[0].message.content for _ in range(3)}
    assert len(fresh) == 3
    greedy = ask(client, temperature=0, top_p=0.5, seed=3)
    assert greedy.choices[0].message.content == expected["text"]


def test_a_stop_string_ends_the_answer(client, expected) -> None:
    stop = expected["text"][5:7]
    completion = ask(client, stop=stop)
    begin = expected["text"].split(stop)[0]
    assert completion.choices[0].message.content == begin
    assert completion.choices[0].finish_reason == "stop"
    num_tokens = completion.usage.completion_tokens
    assert 0 < num_tokens < len(expected["answer"].token_ids)
    # A string that only begins in the answer changes nothing, and four are the most.
    stops = ["never met", stop + "X", stop, expected["text"][-2:] + "X"]
    pieces, reason, num_streamed = read_stream(ask(client, stop=stops, **STREAMED))
    assert ("".join(pieces), reason, num_streamed) == (begin, "stop", num_tokens)
    pieces, reason, num_streamed = read_stream(ask(client, stop=stops[-1], **STREAMED))
    assert "".join(pieces) == expected["text"]
    assert (reason, num_streamed) == (
        expected["answer"].finish_reason, len(expected["answer"].token_ids),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "'gpt-4' does not exist"),
        ({"max_tokens": 500}, openai.BadRequestError, "500 new tokens asked for, 200 is the most"),
        ({"temperature": 2.5}, openai.BadRequestError, "temperature: .* less than or equal to 2"),
        ({"temperature": True}, openai.BadRequestError, "temperature: .* valid number"),
        ({"top_p": 0}, openai.BadRequestError, "top_p: .* greater than 0"),
        ({"seed": 2**64}, openai.BadRequestError, "seed: .* less than 9223372036854775808"),
        ({"n": 2}, openai.BadRequestError, "n: .* less than or equal to 1"),
        ({"stop": list("abcde")}, openai.BadRequestError, "stop: .* at most 4 items"),
        ({"messages": [ask_user("hi")]}, openai.BadRequestError, "0 images"),
        (
            {"messages": [ask_user("左" * 380, FRAMES[0])]},
            openai.BadRequestError,
            "40 new ones, but at most 400 fit together",
        ),
        (
            {"messages": [ask_user("hi", b"GIF89a")]},
            openai.BadRequestError,
            "image 1: no JPEG",
        ),
    ],
)
def test_bad_requests_are_told_why(client, changes, error, message) -> None:
    with pytest.raises(error, match=message) as raised:
        ask(client, **changes)
    assert raised.value.body.keys() == {"message", "type", "param", "code"}


def test_keys_models_health_and_metrics(address, client) -> None:
    with pytest.raises(openai.AuthenticationError, match="needs a valid API key"):
        ask(openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0))
    assert [m.id for m in client.models.list()] == ["ultra-random", "second"]
    assert client.models.retrieve("ultra-random").id == "ultra-random"
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}) as http:
        assert httpx.get(f"{address}/health/live").json() == {"status": "ok"}
        assert httpx.get(f"{address}/health/ready").status_code == 401
        assert http.get("/health/ready").json() == {"status": "ok"}
        assert 'ultra_requests_total{process="' in http.get("/metrics").text
        assert [http.get(p).status_code for p in ("/docs", "/redoc", "/openapi.json")] == [404] * 3
        assert http.get("/nothing").json()["error"]["message"] == "Not Found"


def count_answered(address: str) -> float:
    text = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    lines = [x for x in text.splitlines() if x.startswith("ultra_requests_total")]
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if 'status="200"' in x)


def test_clients_that_leave_cancel_their_answers(address, client) -> None:
    from ray import serve

    language = serve.get_deployment_handle("LanguageReplica", "ultra")
    stats = language.stats.remote().result()
    assert (stats["answers"], stats["prefill_tokens"]) == (0, 0)
    before = count_answered(address)
    streams = [ask(client, stream=True, max_tokens=200) for _ in range(16)]
    for stream in streams:
        next(stream)
        stream.close()
    deadline = time.monotonic() + 30
    while language.stats.remote().result()["answers"] and time.monotonic() < deadline:
        time.sleep(0.05)
    after = language.stats.remote().result()
    assert (after["answers"], after["prefill_tokens"]) == (0, 0)
    num_answered = count_answered(address) - before
    assert num_answered < len(streams)
    assert after["cancelled"] - stats["cancelled"] >= len(streams) - num_answered


def test_no_log_of_the_cluster_holds_what_was_asked_or_answered(client) -> None:
    messages = [
        {"role": "system", "content": CANARIES["system"]},
        ask_user(CANARIES["user"], CANARY_IMAGE),
    ]
    answers = [ask(client, messages=messages).choices[0].message.content]
    ask(client, messages=messages, stream=True).close()
    for change in ({"temperature": 9}, {"max_tokens": 199}, {"stop": CANARIES["user"] * 9}):
        long = [messages[0], ask_user(CANARIES["user"] * 30, CANARY_IMAGE)]
        with pytest.raises(openai.BadRequestError):
            ask(client, messages=long, **change)
    logs = Path("/tmp/ray/session_latest/logs")
    texts = [p.read_text(errors="replace") for p in logs.rglob("*") if p.is_file()]
    assert any("LanguageReplica" in text for text in texts)  # this cluster's, and written by now
    for text in texts:
        assert find_canaries(text) == []
        assert not any(answer in text for answer in answers)


def test_a_dead_engine_is_a_lost_replica_and_unhealthy(random_checkpoint, monkeypatch) -> None:
    from ultra.serve import on_ray
    from ultra.serve.events import Question, Seen

    args = on_ray.ServeArgs(models={"m": random_checkpoint})
    replica = on_ray.LanguageReplica.func_or_class(args, random_checkpoint)
    monkeypatch.setattr(on_ray, "_own_name", lambda: "name")
    visual = checkpoint.load_visual(random_checkpoint).look([FRAMES])[0]
    question = Question((Turn("user", "左叶"),), (), 9)

    async def collect() -> list:
        return [e async for e in replica.answer(Seen(visual, 0, "encoder"), "x", question)]

    assert asyncio.run(collect())[-1].num_tokens == 9
    replica.check_health()
    replica._language._generator._manager._generation_step = None  # the engine dies of it
    with pytest.raises(on_ray.EngineDied):
        asyncio.run(collect())
    assert on_ray.EngineDied in on_ray.LOST
    with pytest.raises(RuntimeError, match="has died"):
        replica.check_health()
    replica._language.stop()


def test_the_ingress_needs_no_torch() -> None:
    code = "import sys, ultra.serve.on_ray; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.split() == [b"False"]


def test_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    from ultra.serve.limits import ServeArgs

    raw = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(raw)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    args = ServeArgs.model_validate(application.args)
    assert schema.http_options.request_timeout_s > args.deadline_s
    by_name = {d.name: d for d in application.deployments}
    assert by_name.keys() == {"Ingress", "EncoderReplica", "LanguageReplica"}
    for deployment in application.deployments:
        assert deployment.autoscaling_config["max_replicas"] >= 1
        assert 0 < deployment.max_queued_requests < math.inf
        assert deployment.max_surge_percent == 100
    for name in ("Ingress", "LanguageReplica"):  # they hold an answer to its end
        assert by_name[name].graceful_shutdown_timeout_s > args.deadline_s
    signals = {
        "EncoderReplica": {"queued_frames"},
        "LanguageReplica": {"answers", "prefill_tokens"},
    }
    for name, expected in signals.items():
        policy = by_name[name].autoscaling_config["policy"]
        assert policy["policy_kwargs"]["targets"].keys() == expected

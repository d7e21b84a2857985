from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tests.conftest import free_port
from tests.data.writer.endpoint_server import COMPLETION_TOKENS, PROMPT_TOKENS, serve
from ultra.config import InstructionsConfig
from ultra.data.writer.endpoint import MESSAGE_TOKENS, Endpoint, Outcome, read_costs, read_reply
from ultra.data.writer.orders import Order, place_order
from ultra.types import FrameGroup

COST = (2 * PROMPT_TOKENS + 8 * COMPLETION_TOKENS) / 1e6
"""Of an answer, by the prices of `config_at`."""


def config_at(folder: Path, base_url: str, **changes: Any) -> InstructionsConfig:
    return InstructionsConfig(
        **{
            "writer": "endpoint",
            "base_url": base_url,
            "model": "m",
            "replies_uri": str(folder),
            "timeout_s": 0.5,
            "max_retries": 2,
            "max_tokens": 500,
            "prompt_price": 2,
            "completion_price": 8,
            **changes,
        }
    )


def order(word: str, config: InstructionsConfig) -> Order:
    group = FrameGroup("e", "p", "肝脏", f"肝右叶见囊肿，{word}。", "囊肿。", (), (), ())
    found = place_order(group, config, site_cue=True)
    assert found is not None
    return found


def ask(config: InstructionsConfig, orders: list[Order]) -> tuple[list[Outcome], Endpoint]:
    async def run() -> tuple[list[Outcome], Endpoint]:
        endpoint = Endpoint(config, SecretStr("secret"))
        return list(await asyncio.gather(*map(endpoint.ask, orders))), endpoint

    return asyncio.run(run())


def test_whatever_goes_wrong_first_is_tried_again_and_paid_once(tmp_path: Path) -> None:
    faults = {"甲": ["429"], "乙": ["500"], "丙": ["drop"], "丁": ["hang"], "戊": ["429", "500"]}
    with serve(lambda text: text[-4:], faults) as (url, account):
        config = config_at(tmp_path, url)
        orders = [order(word, config) for word in faults]
        outcomes, endpoint = ask(config, orders)
        assert [outcome.state for outcome in outcomes] == ["paid"] * 5
        assert [account.requests[o.digest] for o in orders] == [2, 2, 2, 2, 3]
        assert set(account.answered.values()) == {1}
        assert account.keys == {"secret"}
        again, _ = ask(config, orders)
        assert [outcome.state for outcome in again] == ["kept"] * 5
        assert sum(account.requests.values()) == 11
    assert endpoint.spent == pytest.approx(5 * COST)
    replies = [read_reply(str(tmp_path), o.digest) for o in orders]
    assert {r.content for r in replies if r} == {orders[0].body["messages"][1]["content"][-4:]}
    assert "secret" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_what_stays_wrong_fails_with_its_reason_and_is_asked_again_next_time(
    tmp_path: Path,
) -> None:
    faults = {
        "甲": ["429"] * 3, "乙": ["503"] * 3, "丙": ["drop"] * 3, "丁": ["hang"] * 3,
        "戊": ["400"], "己": ["garbage"],
    }  # fmt: skip
    with serve(lambda text: "{}", faults) as (url, account):
        config = config_at(tmp_path, url)
        orders = [order(word, config) for word in faults]
        outcomes, endpoint = ask(config, orders)
        assert [(o.state, o.detail) for o in outcomes] == [
            ("failed", "status 429"),
            ("failed", "status 503"),
            ("failed", "connection lost"),
            ("failed", "no answer in time"),
            ("failed", "status 400"),
            ("failed", "the answer is not JSON"),
        ]
        # Nobody knows whether these were billed, so they count in full.
        lost = [endpoint.most(orders[i]) for i in (2, 3, 5)]
        assert endpoint.spent == pytest.approx(sum(lost))
        assert read_costs(str(tmp_path)) == {}
        assert [o.state for o in ask(config, orders)[0]] == ["paid"] * 6
    assert set(account.answered.values()) == {1}


def test_an_answer_of_another_shape_was_paid_for_and_is_kept(tmp_path: Path) -> None:
    faults = {"甲": ["no schema"], "乙": ["no choices"], "丙": ["no usage"], "丁": ["cut"]}
    with serve(lambda text: "{}", faults) as (url, account):
        config = config_at(tmp_path, url)
        orders = [order(word, config) for word in faults]
        outcomes, endpoint = ask(config, orders)
        assert [outcome.state for outcome in outcomes] == ["paid"] * 4
        assert [o.state for o in ask(config, orders)[0]] == ["kept"] * 4
        assert set(account.requests.values()) == {1}
    replies = [read_reply(str(tmp_path), o.digest) for o in orders]
    assert [r and (r.content, r.finish_reason) for r in replies] == [
        ("", "no choices"), ("", "no choices"), ("{}", "stop"), ("{}", "length"),
    ]  # fmt: skip
    most = endpoint.most(orders[0])
    assert [r and r.cost for r in replies] == pytest.approx([most, COST, most, COST])


def test_exams_with_one_report_share_one_reply(tmp_path: Path) -> None:
    with serve(lambda text: "{}", pause_s=0.1) as (url, account):
        config = config_at(tmp_path, url)
        outcomes, _ = ask(config, [order("甲", config)] * 5)
    assert Counter(o.state for o in outcomes) == {"paid": 1, "kept": 4}
    assert sum(account.requests.values()) == 1


def test_no_more_requests_are_under_way_than_allowed(tmp_path: Path) -> None:
    with serve(lambda text: "{}", pause_s=0.05) as (url, account):
        config = config_at(tmp_path, url, max_concurrency=3, timeout_s=30)
        outcomes, _ = ask(config, [order(str(n), config) for n in range(20)])
    assert {o.state for o in outcomes} == {"paid"}
    assert account.most_at_once == 3


def test_the_most_an_order_can_cost_counts_bytes_and_the_longest_reply(tmp_path: Path) -> None:
    config = config_at(tmp_path, "http://127.0.0.1:1")
    endpoint = Endpoint(config, SecretStr("-"))
    texts = [{"role": "system", "content": "a肝"}, {"role": "user", "content": "bc"}]
    prompt = 4 + 2 + 2 * MESSAGE_TOKENS
    cost = (2 * prompt + 8 * 70) / 1e6
    assert endpoint.most(Order("d", {"messages": texts, "max_tokens": 70})) == pytest.approx(cost)


def test_the_cap_is_never_exceeded_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    with serve(lambda text: "{}") as (url, account):
        config = config_at(tmp_path, url)
        orders = [order(str(n), config) for n in range(10, 22)]
        most = Endpoint(config, SecretStr("-")).most(orders[0])
        assert most > COST
        # Room for five: four answers, and the most that the fifth could cost.
        capped = config.model_copy(update={"spend_cap": 4 * COST + most})
        outcomes, endpoint = ask(capped, orders)
        assert Counter(o.state for o in outcomes) == {"paid": 5, "left": 7}
        assert endpoint.spent == pytest.approx(5 * COST)
        assert sum(account.requests.values()) == 5
        outcomes, endpoint = ask(capped, orders)
        assert Counter(o.state for o in outcomes) == {"kept": 5, "left": 7}
        assert sum(account.requests.values()) == 5
        larger = config.model_copy(update={"spend_cap": 11 * COST + most})
        outcomes, endpoint = ask(larger, orders)
        assert Counter(o.state for o in outcomes) == {"kept": 5, "paid": 7}
    assert endpoint.spent == pytest.approx(12 * COST)
    assert set(account.answered.values()) == {1}


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_an_endpoint_that_refuses_one_is_not_asked_for_the_rest(
    tmp_path: Path, status: str
) -> None:
    with serve(lambda text: "{}", {"囊肿": [status] * 99}) as (url, account):
        config = config_at(tmp_path, url, max_concurrency=1)
        outcomes, _ = ask(config, [order(str(n), config) for n in range(5)])
    assert {o.state for o in outcomes} == {"refused"}
    assert f"status {status}" in outcomes[0].detail
    assert sum(account.requests.values()) == 1


def test_an_endpoint_that_is_not_there_costs_nothing(tmp_path: Path) -> None:
    config = config_at(tmp_path, f"http://127.0.0.1:{free_port()}/v1", spend_cap=1, max_retries=0)
    (outcome,), endpoint = ask(config, [order("甲", config)])
    assert (outcome.state, outcome.detail) == ("failed", "connection lost")
    assert endpoint.spent == 0

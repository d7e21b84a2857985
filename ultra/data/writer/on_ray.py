"""The instructions job on Ray Data: one actor pays, tasks write.

Requests wait and do not compute, so one process carries as many as an endpoint bears, and there the
limits hold exactly: requests under way, money spent.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray.data
from pydantic import SecretStr

from ultra import storage
from ultra.config import ConfigError, DataConfig, InputError, InstructionsConfig
from ultra.data import parquet, schema
from ultra.data.on_ray import map_tasks
from ultra.data.parquet import Part
from ultra.data.writer.counts import Bill, FillCounts, InstructionCounts
from ultra.data.writer.endpoint import Endpoint
from ultra.data.writer.fill import Filled, fill_part, sheet_uri
from ultra.data.writer.orders import Order, place_order
from ultra.data.writer.review import read_decisions, write_sheet

_TEXTS = [name for name in schema.TEXT_COLUMNS if name != "content_sha256"]


def write_instructions(data: DataConfig, config: InstructionsConfig) -> InstructionCounts:
    """Give every exam of the table its conversations and return what came of it.

    Raises:
        StorageError: when there is no complete table of exams.
        ConfigError: when the variable of the endpoint's key is not set.
        InputError: when the endpoint refuses every request, or the review sheet cannot be read.
    """
    parts = parquet.read_parts(data.exams_uri)
    decisions = read_decisions(config.review_uri)
    bill = Bill() if config.writer == "rules" else _ask(parts, data, config)
    filled: list[Filled] = map_tasks(parts, lambda part: fill_part(part, data, config, decisions))
    parquet.publish_parts(config.rejected_uri, [f.rejected for f in filled if f.rejected])
    parquet.publish_parts(data.exams_uri, [f.exams for f in filled])
    sheet_rows = _publish_sheet(filled, config) if config.review_uri else 0
    return InstructionCounts(sum((f.counts for f in filled), FillCounts()), bill, sheet_rows)


def _publish_sheet(filled: Sequence[Filled], config: InstructionsConfig) -> int:
    uri = sheet_uri(config)
    parquet.publish_parts(uri, [f.sheet for f in filled if f.sheet])
    rows = (row for part in parquet.part_uris(uri) for row in parquet.read_rows(part))
    return write_sheet(config.review_uri, rows)


def _ask(parts: Sequence[Part], data: DataConfig, config: InstructionsConfig) -> Bill:
    """Pay for the replies that are not kept yet."""
    storage.resolve(config.replies_uri)
    key = _api_key(config)

    def orders(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for exam in parquet.read_rows(row["part"], columns=_TEXTS):
            if order := place_order(schema.from_row(exam), config, data.site_cue):
                yield {"digest": order.digest, "body": json.dumps(order.body)}

    uris = [{"part": parquet.part_uri(data.exams_uri, part)} for part in parts]
    if not uris:
        return Bill()
    asked = (
        ray.data.from_items(uris, override_num_blocks=len(uris))
        .flat_map(orders)
        .map_batches(
            _Ask,
            fn_constructor_args=(config, key),
            batch_size=config.max_concurrency,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0,
        )
    )
    return _add_up(asked.iter_rows())


def _add_up(rows: Iterable[dict[str, Any]]) -> Bill:
    states: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    cost = spent = 0.0
    for row in rows:
        if row["state"] == "refused":
            raise InputError(f"instructions.base_url: the endpoint refuses: {row['detail']}")
        states[row["state"]] += 1
        failures.update([row["detail"]] if row["detail"] else [])
        cost += row["cost"]
        spent = max(spent, row["spent"])
    return Bill(states, failures, cost, spent)


def _api_key(config: InstructionsConfig) -> SecretStr:
    if not config.api_key_env:
        return SecretStr("none")
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"instructions.api_key_env: the variable {config.api_key_env} is not set; "
            "set it, or give '' for an endpoint that wants no key"
        )
    return SecretStr(key)


class _Ask:
    """The one who pays. Batches overlap, so that a slow request keeps only its own place."""

    def __init__(self, config: InstructionsConfig, key: SecretStr) -> None:
        self.endpoint = Endpoint(config, key)

    async def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        orders = [
            Order(digest, json.loads(body))
            for digest, body in zip(batch["digest"], batch["body"], strict=True)
        ]
        outcomes = await asyncio.gather(*map(self.endpoint.ask, orders))
        return {
            "state": [outcome.state for outcome in outcomes],
            "detail": [outcome.detail for outcome in outcomes],
            "cost": [outcome.cost for outcome in outcomes],
            "spent": [self.endpoint.spent] * len(outcomes),
        }

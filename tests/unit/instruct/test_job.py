"""What a request's key depends on, which images a count chooses, and what a job may cost."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from anyres_vlm.errors import UsageError
from anyres_vlm.instruct.annotations import Box, Object, Scene
from anyres_vlm.instruct.budget import Budget, estimate, highest_cost
from anyres_vlm.instruct.job import KINDS, SHIPPED, Checks, Item, Job, Kind, Price, choose, load_prompts, load_settings
from anyres_vlm.instruct.log import Spent

JOB = Job(
    model="m",
    parameters={"max_tokens": 100},
    prompts=load_prompts(None, boxes=False),
    seed=0,
    checks=Checks(),
    longest_answer=100,
    price=Price(input=1, output=2),
)
SCENES = [Scene(str(n), f"{n}.jpg", (f"Dog {n}.",), (Object("dog", Box(0, 0, 1, 1)),)) for n in range(50)]
ITEM = Item(JOB, "detail", SCENES[0])


def test_the_key_changes_with_all_that_decides_the_request_and_with_nothing_else(tmp_path: Path) -> None:
    prompt = yaml.safe_load((SHIPPED / "detail.yaml").read_text())
    (tmp_path / "detail.yaml").write_text(yaml.safe_dump(prompt | {"system": prompt["system"] + "x"}))
    others = [
        Item(JOB.model_copy(update={"model": "n"}), "detail", SCENES[0]),
        Item(JOB.model_copy(update={"parameters": {"max_tokens": 101}}), "detail", SCENES[0]),
        Item(JOB.model_copy(update={"prompts": load_prompts(tmp_path, boxes=False)}), "detail", SCENES[0]),
        Item(JOB, "reasoning", SCENES[0]),
        Item(JOB, "detail", SCENES[1]),
        Item(JOB, "detail", replace(SCENES[0], captions=("Other.",))),
        Item(JOB, "detail", replace(SCENES[0], objects=())),
    ]
    assert len({item.key for item in [ITEM, *others]}) == 8
    same = [
        JOB.model_copy(update={"seed": 5}),
        JOB.model_copy(update={"price": None}),
        JOB.model_copy(update={"checks": Checks(attempts=9)}),
    ]
    assert {Item(job, "detail", SCENES[0]).key for job in same} == {ITEM.key}
    assert Item(JOB, "conversation", SCENES[0]).key == Item(JOB, "conversation", replace(SCENES[0], objects=())).key


def test_a_job_survives_its_record() -> None:
    assert Job.model_validate_json(JOB.model_dump_json()) == JOB
    JOB.require_same(JOB.model_copy(update={"price": None}), "out")
    with pytest.raises(UsageError, match=r"out holds a job with other settings \(seed, the prompt of conversation\)"):
        JOB.model_copy(update={"seed": 1, "prompts": load_prompts(None, boxes=True)}).require_same(JOB, "out")


def test_a_larger_count_holds_the_smaller_and_kinds_draw_apart() -> None:
    small = [item.scene.id for item in choose(JOB, SCENES, {"detail": 10})]
    large = [item.scene.id for item in choose(JOB, SCENES[::-1], {"detail": 30})]
    assert large[:10] == small
    assert len(set(large)) == 30
    assert [item.scene.id for item in choose(JOB, SCENES, {"reasoning": 10})] != small
    assert [item.scene.id for item in choose(JOB.model_copy(update={"seed": 1}), SCENES, {"detail": 10})] != small


def test_a_user_s_prompts_replace_those_of_their_kind(tmp_path: Path) -> None:
    (tmp_path / "reasoning.yaml").write_text("system: Think.\nboxes: true\n")
    prompts = load_prompts(tmp_path, boxes=False)
    assert prompts["reasoning"].messages("c") == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "c"},
    ]
    assert {kind for kind in KINDS if prompts[kind] == JOB.prompts[kind]} == {"conversation", "detail"}
    (tmp_path / "reasoning.yaml").write_text("sytem: Think.\nboxes: true\n")
    with pytest.raises(UsageError, match=r"unknown key sytem; did you mean system\?"):
        load_prompts(tmp_path, boxes=False)


def test_reservations_never_pass_a_limit() -> None:
    cost, tokens = highest_cost(ITEM, batched=False)
    assert highest_cost(ITEM, batched=True) == (pytest.approx(cost / 2), tokens)
    items = [Item(JOB, "detail", scene) for scene in SCENES[:10]]  # ids of one length: all cost the same

    async def reserved(**limits: float) -> int:
        budget = Budget(JOB, Spent(prompt_tokens=5, cost=cost / 2), **limits)  # type: ignore[arg-type]
        return sum(budget.reserve_now(item, batched=False) for item in items)

    assert asyncio.run(reserved()) == 10
    assert asyncio.run(reserved(max_cost=3.6 * cost)) == 3
    assert asyncio.run(reserved(max_tokens=4 * tokens + 4)) == 3
    assert asyncio.run(reserved(max_tokens=4 * tokens + 5)) == 4


def test_an_estimate_is_its_items_sum() -> None:
    whole, half = estimate([ITEM] * 6, batched=False), estimate([ITEM] * 3, batched=True)
    assert whole.requests == 6
    assert whole.prompt_tokens == 6 * ITEM.prompt_tokens == 2 * half.prompt_tokens
    assert whole.cost == pytest.approx((whole.prompt_tokens + 2 * whole.completion_tokens) / 1e6)
    assert half.cost == pytest.approx((whole.cost or 0) / 4)
    assert whole.most == pytest.approx(6 * 3 * highest_cost(ITEM, batched=False)[0])


CAPTIONS = (
    "A man riding a wave on top of a surfboard.",
    "A couple of people that are standing in the snow with skis.",
)


@pytest.mark.parametrize(
    ("kind", "boxes", "counted"),  # by o200k_base, GPT-4o's tokenizer, with four tokens a message and three a chat
    [
        ("conversation", 0, 534),
        ("detail", 0, 388),
        ("detail", 40, 1308),
        ("reasoning", 7, 605),
        ("reasoning", 40, 1364),
    ],
)
def test_estimated_tokens_are_near_gpt_4o_s_and_bounds_above_them(kind: Kind, boxes: int, counted: int) -> None:
    objects = tuple(Object("traffic light", Box(n / 100, 0.25, 0.5 + n / 100, 0.875)) for n in range(boxes))
    item = Item(JOB, kind, Scene("1", "1.jpg", CAPTIONS, objects))
    assert item.prompt_tokens == pytest.approx(counted, rel=0.03)
    assert highest_cost(item, batched=False)[1] > counted + JOB.longest_answer


@pytest.mark.parametrize("text", ["一只棕色的狗" * 50, "🐕\u200d🦺" * 50, "3.14159" * 50])
def test_no_tokenizer_passes_the_bound(text: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    told, silent = (Item(JOB, "detail", replace(SCENES[0], captions=said)) for said in ((text,), ()))
    tokens = len(tiny_tokenizer(text)["input_ids"])  # it knows no such words: about a token a byte
    assert highest_cost(told, batched=False)[1] - highest_cost(silent, batched=False)[1] >= tokens >= len(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("parameters: {temperature: 1}", "parameters needs max_tokens or max_completion_tokens"),
        ("parameters: {max_tokens: 9, model: x}", "parameters may not set model"),
        ("limits: {concurency: 3}", "unknown key limits.concurency; did you mean concurrency?"),
        ("checks: {max_similarity: 2}", "checks.max_similarity"),
    ],
)
def test_wrong_settings(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(UsageError) as caught:
        load_settings(tmp_path / "s.yaml", {})
    assert said in str(caught.value)

"""What one response of the raw log is worth."""

from __future__ import annotations

import json
from typing import Any

from anyres_vlm.instruct.budget import Spent
from anyres_vlm.instruct.grounding import require_grounded
from anyres_vlm.instruct.job import Item, Job, estimate_tokens
from anyres_vlm.instruct.parse import Parsed, Reject, parse_response
from anyres_vlm.instruct.scene import Scene


def response_entry(item: Item, attempt: int, status: int, body: str, batch: str | None = None) -> dict[str, Any]:
    """A response as the raw log keeps it."""
    entry = {"key": item.key, "attempt": attempt, "kind": item.kind, "scene": item.scene.to_json()}
    return {**entry, "status": status, "body": body, **({} if batch is None else {"batch": batch})}


def item_of(entry: dict[str, Any], job: Job) -> Item:
    """The item that a response is of."""
    return Item(job, entry["kind"], Scene.from_json(entry["scene"]))


def judge(entry: dict[str, Any], item: Item) -> Parsed:
    """The conversation of a response. Raises `Reject`."""
    if entry["status"] != 200:
        raise Reject("refused_request", f"HTTP {entry['status']}: {entry['body'][:200]}")
    completion = _decode(entry["body"])
    try:
        (choice, *_) = completion["choices"]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
        refusal = choice["message"].get("refusal")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Reject("broken_response", "no chat completion: it has no choices with a message") from None
    if refusal or reason == "content_filter":
        raise Reject("refusal", f"the endpoint reports a refusal: {str(refusal or reason)[:80]}")
    if reason == "length":
        raise Reject("cut_short", f"the answer reached the limit of {item.job.longest_answer} tokens")
    if not isinstance(text, str):
        raise Reject("broken_response", f"the message's content is {type(text).__name__}, expected text")
    prompt = item.job.prompts[item.kind]
    question = prompt.questions[int(item.key[:8], 16) % len(prompt.questions)] if prompt.questions else ""
    parsed = parse_response(text, prompt, question)
    require_grounded(parsed.turns, item.scene, item.job.checks.max_absent_objects)
    return parsed


def add_spent(spent: Spent, entry: dict[str, Any], item: Item) -> int:
    """Add what a response cost. Returns its tokens: the endpoint's count, or an estimate where it gave none."""
    if entry["status"] != 200:
        return 0
    prompt, answer = _usage(entry, item)
    spent.prompt_tokens += prompt
    spent.completion_tokens += answer
    if item.job.price is not None:
        spent.cost += item.job.price.cost(prompt, answer, "batch" in entry)
    return prompt + answer


def _usage(entry: dict[str, Any], item: Item) -> tuple[int, int]:
    try:
        usage = _decode(entry["body"])["usage"]
        prompt, answer = usage["prompt_tokens"], usage["completion_tokens"]
        if isinstance(prompt, int) and isinstance(answer, int) and prompt >= 0 and answer >= 0:
            return prompt, answer
    except (Reject, KeyError, TypeError):
        pass
    return item.prompt_tokens, estimate_tokens(entry["body"])


def _decode(body: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Reject("broken_response", f"the body is no JSON, {len(body)} characters: {body[:60]!a}") from None

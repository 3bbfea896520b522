"""A server that speaks OpenAI's chat and batch API, for tests: it answers well, or with the faults that it is told.

    python openai_server.py STATE_FOLDER [--faults 429,500,...] [--rate 0.2] [--delay 0.0]
                            [--once "POST /batches:after:drop" ...]

`--once` spoils the next request of a route, before or after the server has done what was asked, once for each time it
is given: `drop` cuts the connection, `cut` sends half an answer, `hang` none, `empty` no batches, a number is an HTTP
status, `later` a 429 for 1.6 seconds. Ids are `ID`.

Prints its port. What it has answered, and so been paid for, is in STATE_FOLDER/answered.jsonl: it survives the clients.
Faults are drawn from the request's name and how often it was asked, so that a run of tests is one run.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

NAMES = "lantern river pebble willow harbour meadow copper velvet thunder orchard island marble falcon cedar".split()
NAMES += [
    "caf\u00e9",
    "\u732b",
    "\U0001f415",
    "line\u2028break",
    "next\u0085line",
]  # raw in JSON, as the API sends them


class Server:
    def __init__(self, state: Path, faults: list[str], rate: float, delay: float, once: list[list[str]]) -> None:
        self.state, self.faults, self.rate, self.delay, self.once = state, faults, rate, delay, once
        self.asked: Counter[str] = Counter()
        self.answered = (state / "answered.jsonl").open("a")
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.under_way = self.most_under_way = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
                try:
                    reply = await self.spoiled(method, path, headers, body)
                finally:
                    self.under_way -= 1
                writer.write(reply)
                await writer.drain()
                if not reply or b"\r\nconnection: close" in reply:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def spoiled(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        """The reply, with what is to happen to this route once."""
        route = re.sub(r"/(file|batch)-[^/]+", "/ID", path.partition("?")[0].removeprefix("/v1"))
        now = next((entry for entry in self.once if entry[0] == f"{method} {route}"), None)
        if now is None:
            return await self.reply(method, path, headers, body)
        self.once.remove(now)
        _, when, what = now
        reply = await self.reply(method, path, headers, body) if when == "after" else b""
        with (self.state / "spoiled.txt").open("a") as stream:
            stream.write(f"{route} {what} {time.time()}\n")
        if what == "hang":
            await asyncio.sleep(3600)
        if what == "later":
            return http(429, {"error": {"message": "slow down"}}, "retry-after: 1.6\r\n")
        if what == "empty":
            return http(200, {"object": "list", "data": [], "has_more": False})
        if what == "cut":
            return reply[: len(reply) - 9].replace(b"content-type", b"connection: close\r\ncontent-type", 1)
        return http(int(what), {"error": {"message": "spoiled"}}) if what.isdecimal() else b""

    async def reply(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        (self.state / "headers.txt").write_text(json.dumps(headers))
        route = path.partition("?")[0].removeprefix("/v1")
        if route == "/chat/completions":
            return await self.chat(headers, json.loads(body))
        if route == "/stats":
            return http(200, {"most_under_way": self.most_under_way, "requests": self.asked.total()})
        if route == "/files" and method == "POST":
            name = f"file-{len(self.files)}"
            boundary = headers["content-type"].partition("boundary=")[2].encode()
            part = next(part for part in body.split(b"--" + boundary) if b'name="file"' in part)
            self.files[name] = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
            return http(200, {"id": name, "object": "file", "bytes": len(self.files[name]), "purpose": "batch"})
        if route.startswith("/files/") and route.endswith("/content"):
            return http(200, self.files[route.split("/")[2]])
        if route == "/batches" and method == "POST":
            return http(200, self.submit(json.loads(body)))
        if route == "/batches":
            return http(200, {"object": "list", "data": list(self.batches.values()), "has_more": False})
        if route.startswith("/batches/"):
            return http(200, self.poll(route.split("/")[2]))
        return http(404, {"error": {"message": f"no route {path}"}})

    async def chat(self, headers: dict[str, str], request: dict) -> bytes:
        name = headers.get("idempotency-key", "")
        self.asked[name] += 1
        chance = random.Random(f"{name} {self.asked[name]}")
        fault = chance.choice(self.faults) if self.faults and chance.random() < self.rate else ""
        await asyncio.sleep(self.delay)
        match fault:
            case "429":
                return http(429, {"error": {"message": "slow down", "code": "rate_limit"}}, "retry-after: 0.05\r\n")
            case "500":
                return http(500, {"error": {"message": "broken"}})
            case "drop":
                return b""
            case "drop_body":
                return http(200, b"{" * 9).replace(b"length: 9", b"length: 4000\r\nconnection: close")
            case "hang":
                await asyncio.sleep(3600)
            case "401":
                return http(401, {"error": {"message": f"Incorrect API key: {headers['authorization'].split()[1]}"}})
            case "400":
                return http(400, {"error": {"message": "content policy"}})
            case "wait_a_day":
                return http(429, {"error": {"message": "quota"}}, "retry-after: 86400\r\n")
            case "slow":
                await asyncio.sleep(0.3)
        content = completion(request, name, fault)
        self.answered.write(json.dumps({"name": name, "fault": fault, "at": time.time()}) + "\n")
        self.answered.flush()
        return http(200, content[: len(content) // 2] if fault == "cut_json" else content)

    def submit(self, order: dict) -> dict:
        name = f"batch-{len(self.batches)}"
        good, bad = [], []
        for request in map(json.loads, self.files[order["input_file_id"]].splitlines()):
            custom = request["custom_id"]
            self.asked[custom] += 1
            chance = random.Random(f"{custom} {self.asked[custom]}")
            fault = chance.choice(self.faults) if self.faults and chance.random() < self.rate else ""
            if fault == "expired":
                bad.append(result(custom, error={"code": "batch_expired"}))
                continue
            if fault == "500":
                bad.append(result(custom, response={"status_code": 500, "body": {}}))
                continue
            body = json.loads(completion(request["body"], custom, fault))
            self.answered.write(json.dumps({"name": custom, "fault": fault}) + "\n")
            line = result(custom, response={"status_code": 200, "body": body})
            good += {"cut_json": [line[: len(line) // 2]], "twice": [line, line]}.get(fault, [line])
        self.answered.flush()
        random.Random(name).shuffle(good)
        batch = {"id": name, "object": "batch", "status": "validating", "metadata": order.get("metadata"), "polls": 0}
        batch |= {"endpoint": order["endpoint"], "input_file_id": order["input_file_id"], "created_at": 0}
        batch["completion_window"] = order["completion_window"]
        for key, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[key] = f"file-{name}-{key}"
                self.files[batch[key]] = "".join(line + "\n" for line in lines).encode()
        self.batches[name] = batch
        return batch

    def poll(self, name: str) -> dict:
        batch = self.batches[name]
        batch["polls"] += 1
        batch["status"] = "in_progress" if batch["polls"] < 2 else "completed"
        return batch


def result(custom: str, response: dict | None = None, error: dict | None = None) -> str:
    """A line of a batch's result."""
    return json.dumps({"custom_id": custom, "response": response, "error": error}, ensure_ascii=False)


def completion(request: dict, name: str, fault: str) -> bytes:
    """A chat completion as the prompt asks for it, about nothing, and different for every request."""
    chance = random.Random(name)
    words = lambda count: " ".join(chance.choices(NAMES, k=count))  # noqa: E731
    system = request["messages"][0]["content"]
    pairs = 4 if "exactly 4 questions" in system else 0 if "Write nothing but the description" in system else 1
    text = "\n".join(f"Question: What of the {words(2)}?\nAnswer: It is the {words(12)}." for _ in range(pairs))
    message: dict = {"role": "assistant", "content": text or f"A view of the {words(40)}."}
    reason = "stop"
    usage = {"prompt_tokens": sum(len(m["content"]) // 4 for m in request["messages"]), "completion_tokens": 100}
    match fault:
        case "nonsense":
            message["content"] = "lorem ipsum " * 5
        case "refusal":
            message["content"] = "I'm sorry, but I can't help with that."
        case "refusal_field":
            message |= {"content": None, "refusal": "no"}
        case "length":
            reason = "length"
        case "dear":  # a token a byte, and the longest answer
            texts = [m["content"].encode() for m in request["messages"]]
            usage = {"prompt_tokens": sum(map(len, texts)), "completion_tokens": request["max_tokens"]}
    identity = hashlib.sha256(name.encode()).hexdigest()[:8]
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    whole = {"id": identity, "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
    return json.dumps({**whole, "usage": usage}, ensure_ascii=False).encode()


def http(status: int, content: bytes | dict, more: str = "") -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode()
        + body
    )


async def serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path)
    parser.add_argument("--faults", default="")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--once", type=lambda text: text.rsplit(":", 2), action="append", default=[])
    given = parser.parse_args()
    faults = [fault for fault in given.faults.split(",") if fault]
    server = Server(given.state, faults, given.rate, given.delay, given.once)
    listening = await asyncio.start_server(server.connection, "127.0.0.1", 0, limit=1 << 26)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())

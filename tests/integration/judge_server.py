"""An OpenAI-compatible endpoint in its own process: `python judge_server.py SCRIPT LOG` serves the script's replies.

The script is a JSON list; each request takes the next reply, the last one again and again: a number is a status, text
an answer, {"sleep": s} an answer that comes too late. Every request's body is a line of the log.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    script: list[Any]
    log: Path

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["path"], body["key"] = self.path, self.headers["Authorization"]
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(body) + "\n")
        reply = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(reply, dict):
            time.sleep(reply["sleep"])
        status = reply if isinstance(reply, int) else 200
        message = {"role": "assistant", "content": reply if isinstance(reply, str) else "0.1"}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": f"{body['model']}-0613",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }
        content = json.dumps(answer if status == 200 else {"error": {"message": f"status {status}"}}).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status in (429, 500):
                self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(content)
        except BrokenPipeError:
            pass  # a client that has given up waiting

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(script: list[Any], log: Path) -> Iterator[str]:
    """The address of a server process that lives as long as the block."""
    command = [sys.executable, __file__, json.dumps(script), str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def requests(log: Path) -> list[dict[str, Any]]:
    """What the server was asked."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


if __name__ == "__main__":
    Handler.script, Handler.log = json.loads(sys.argv[1]), Path(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()

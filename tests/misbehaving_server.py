"""An OpenAI-compatible server on loopback that misbehaves on request, and the bodies of its answers."""

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def choice(text: str | None, reason="stop", **more):
    return {"message": {"role": "assistant", "content": text}, "finish_reason": reason, **more}


def answer(*choices, prompt=10, completion=6):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"choices": list(choices), "usage": usage}


def said(body, count=None):
    """What the server says where nothing else was planned: `n` texts that tell the seed."""
    n = body.get("n", 1) if count is None else count
    words = body["messages"][-1]["content"]
    return answer(*(choice(f"{words}/{body['seed']}/{i}") for i in range(n)), completion=3 * n)


def refusal(message, code=None):
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


@dataclass
class Misbehaving:
    """A server; `plan`: what to do with the next requests whose last message is the key, before it answers well."""

    url: str
    plan: dict[str, list[Any]] = field(default_factory=dict)
    seen: list[tuple[str | None, dict[str, Any]]] = field(default_factory=list)  # keys and bodies
    released: Any = field(default_factory=threading.Event)  # what hangs waits for it
    under_way: int = 0
    most: int = 0  # under way at once
    lock: Any = field(default_factory=threading.Lock)

    def begin(self, key, body):
        with self.lock:
            self.seen.append((key, body))
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            planned = self.plan.get(body["messages"][-1]["content"])
            return planned.pop(0) if planned else ("json", 200, said(body))

    def end(self):
        with self.lock:
            self.under_way -= 1


def handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            what, *more = server.begin(self.headers.get("Authorization"), body)
            try:
                assert self.path == "/v1/chat/completions"
                if what == "hang":
                    server.released.wait()
                    return
                if what == "slow":
                    time.sleep(more[0])
                    what, more = "json", [200, said(body)]
                if what == "drip":
                    what, more = "text", [200, "\n" * more[0] + json.dumps(said(body))]
                if what == "alone":
                    what, more = "json", [200, said(body, 1)]
                status, content, *headers = more
                self.send(status, content if what == "text" else json.dumps(content), what == "cut", *headers)
            except OSError:
                pass  # a client that did not wait
            finally:
                server.end()

        def send(self, status, text, cut, headers=()):
            data = text.encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            whole = data.lstrip(b"\n")
            for _ in range(len(data) - len(whole)):
                time.sleep(0.05)
                self.wfile.write(b"\n")
            self.wfile.write(whole[: len(whole) // 2] if cut else whole)
            self.close_connection = cut or status >= 500

        def log_message(self, *_):
            pass

    return Handler


class Http(ThreadingHTTPServer):
    request_queue_size = 64  # many threads call at once, and a connection that finds no place is reset


@contextmanager
def serving():
    found = Misbehaving("")
    http = Http(("127.0.0.1", 0), handler(found))
    found.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield found
    finally:
        found.released.set()
        http.shutdown()
        http.server_close()
        thread.join()

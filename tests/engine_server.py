"""A serving engine on loopback, as a process of its own: token ids in, ids and log-probabilities out, by transformers.

It serves the random Llama of hf_samples, decodes without any cache, and finds stop strings in text, so that it shares
nothing with what it is compared to. POST /plan says how to misbehave on which prompt, GET /seen what was asked.
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

END = 2
WHOLE = (
    "<search> Morn mayor</search>",
    "<search> harbour museum</search>",
    "<search> Ada novels</search>",
    "<answer> Port Selby</answer>",
    "<answer> Morn</answer>",
)
PARTS = (
    "<search>",
    " Ada",
    " novels",
    "</search>",
    "</sea",
    "rch>",
    "rch> and so on",
    "<answer>",
    "</answer>",
    "</ans",
)
WORDS = tuple(f" w{i}" for i in range(20))
# Many pieces are whole actions, so that a random model takes some; stop strings are also spread over pieces.
PIECES = ("", "", "", *PARTS, *WORDS, *(f" {i} {WHOLE[i % 5]}" for i in range(64 - 3 - len(PARTS) - len(WORDS))))


class PieceTokenizer:
    """Text is the pieces side by side; words from outside become any of the plain ones."""

    vocab_size, pad_id = 64, 0

    def token_id(self, piece):
        return PIECES.index(piece)

    def encode(self, segments):
        first = 3 + len(PARTS)
        return [[first + zlib.crc32(word.encode()) % len(WORDS) for word in segment.split()] for segment in segments]

    def decode(self, ids):
        return ["".join(PIECES[i] for i in row) for row in ids]


class Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock, working = threading.Lock(), threading.Lock()
    plan: ClassVar[dict] = {}
    seen: ClassVar[list] = []
    under_way: ClassVar[set] = set()  # threads
    most: ClassVar[list] = [0]  # requests at once

    def do_GET(self):
        self.send(200, json.dumps({"seen": self.seen, "most": self.most[0]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/plan":
            with self.lock:
                self.plan.clear()
                self.plan.update(body)
                self.seen.clear()
                self.most[0] = 0
            return self.send(200, "{}")
        with self.lock:
            self.seen.append(body)
            self.under_way.add(threading.get_ident())
            self.most[0] = max(self.most[0], len(self.under_way))
            faults = self.plan.get(json.dumps(body["prompt"]), [])
            fault = faults.pop(0) if faults else ""
        if fault == "slow":
            time.sleep(0.3)
        with self.working:
            answer = {} if fault.isdigit() else complete(body)
        with self.lock:
            self.under_way.discard(threading.get_ident())
        if fault.isdigit():
            return self.send(int(fault), json.dumps({"error": {"message": f"error {fault}", "code": None}}))
        spoil(answer["choices"][0], fault)
        return self.send(200, json.dumps(answer), cut=fault == "cut")

    def send(self, status, text, cut=False):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    def log_message(self, *_):
        pass


class Http(ThreadingHTTPServer):
    request_queue_size = 64  # all episodes call at once


def complete(body):
    """The answer of vLLM to a request with `return_token_ids` and `include_stop_str_in_output`."""
    import torch
    from hf_samples import hf_model

    assert body["return_token_ids"]
    assert body["include_stop_str_in_output"]
    ids, drawn, logprobs, text, reason = list(body["prompt"]), [], [], "", "length"
    generator = torch.Generator().manual_seed(body["seed"])
    while len(drawn) < body["max_tokens"]:
        with torch.no_grad():
            logits = hf_model("llama")(torch.tensor([ids + drawn])).logits[0, -1].float()
        if body["temperature"] == 0:
            token = int(logits.argmax())
        else:
            share = (logits / body["temperature"]).softmax(-1)
            token = int(torch.multinomial(share, 1, generator=generator))
        drawn.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        text += PIECES[token]
        found = [text.index(stop) + len(stop) for stop in body["stop"] if stop in text]
        if found or token in body["stop_token_ids"]:
            text, reason = text[: min(found, default=None)], "stop"
            break
    choice = {
        "text": text,
        "token_ids": drawn,
        "prompt_token_ids": ids,
        "logprobs": {"token_logprobs": logprobs, "tokens": [PIECES[i] for i in drawn]},
        "finish_reason": reason,
    }
    return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(drawn)}}


def spoil(choice, fault):
    """Makes an answer a bad one."""
    if fault in ("token_ids", "logprobs"):
        del choice[fault]
    elif fault == "other text":
        choice["text"] = "something else"
    elif fault == "other prompt":
        choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]
    elif fault == "strange id":
        choice["token_ids"][0] = 64
    elif fault == "few logprobs":
        choice["logprobs"]["token_logprobs"].pop()
    elif fault == "aborted":
        choice["finish_reason"] = "abort"
    elif fault == "no stop":
        choice.update(token_ids=[30, 30], text=PIECES[30] * 2, finish_reason="stop")
        choice["logprobs"]["token_logprobs"] = [-1.0, -1.0]
    elif fault == "beyond":
        choice["token_ids"] += [5, 30]
        choice["logprobs"]["token_logprobs"] += [-1.0, -2.0]


class Client:
    """The process as a test sees it."""

    def __init__(self, port):
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def plan(self, faults=()):
        """The next faults of each prompt; forgets what was seen."""
        data = json.dumps({json.dumps(list(prompt)): kinds for prompt, kinds in faults}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.root}/plan", data, method="POST")).close()

    def seen(self, what="seen"):
        with urllib.request.urlopen(f"{self.root}/seen") as answer:
            return json.load(answer)[what]


@contextmanager
def engine():
    here = Path(__file__).resolve()
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}
    process = subprocess.Popen([sys.executable, str(here)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        with process.stdout:
            port = process.stdout.readline().strip()
            assert port.isdigit(), "the engine did not start"
            yield Client(port)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    complete({"prompt": [1], "max_tokens": 1, "temperature": 0, "seed": 0, "stop": [], "stop_token_ids": [],
              "return_token_ids": True, "include_stop_str_in_output": True})  # fmt: skip
    http = Http(("127.0.0.1", 0), Engine)
    print(http.server_port, flush=True)
    http.serve_forever()

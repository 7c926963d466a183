"""The server under load on loopback, beside the engine alone; a table, and one JSON line last.

  python scripts/bench/serve.py --config=configs/demo.py               a run that was trained
  python scripts/bench/serve.py --config=configs/demo.py --hostile=1000 --soak-secs=600 --late=200

  --clients 1 8 32   at once; each asks again as soon as it has its answer
  --secs=N           for each of them, and for the engine alone with as many texts (20)
  --hostile=N        requests of which some leave, send nonsense or read slowly: every other must
                     get the answer that it gets alone
  --soak-secs=N      memory of the server while 8 clients ask all the time
  --late=N           requests that are given half a second each, then a short one

Answers are sampled as in a chat and 64 tokens long. First: from asking to the first text; gap:
between two pieces of text; fair: answers of the slowest client over those of the fastest.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.config import Recipe, load, parse_argv
from nanochat_jax.inference.checkpoint import make_engine, open_model
from nanochat_jax.inference.request import Request
from nanochat_jax.tokenizer.chat import render_for_completion
from scripts.bench import common

ROOT = Path(__file__).parents[2]
SLOTS, ANSWER_TOKENS = 32, 64
QUESTIONS = [f"Tell me something about the number {n}." for n in range(64)]
SAMPLING = {"temperature": 0.6, "top_k": 50}


class Client:
    """Asks one server, over a connection for each question."""

    def __init__(self, address: str):
        self.host, port = address.rsplit("//")[1].split(":")
        self.port = int(port)

    async def ask(
        self, body: bytes, *, pause: float = 0.0, leave_after: int | None = None
    ) -> dict[str, Any]:
        """status, text, tokens and the times of all pieces of an answer."""
        asked, text, tokens, times = time.perf_counter(), "", 0, []
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
            status = int((await reader.readline()).split()[1])
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return {"status": status, "error": event["error"]["message"]}
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        text += piece
                        times.append(time.perf_counter() - asked)
                if leave_after is not None and len(times) > leave_after:
                    break
                await asyncio.sleep(pause)
        finally:
            writer.close()
        return {"status": status, "text": text, "tokens": tokens, "times": times}

    def body(self, number: int, **more: Any) -> bytes:
        """The question of this number; the same number gets the same answer."""
        messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
        body = {
            "messages": messages,
            "seed": number,
            "max_tokens": ANSWER_TOKENS,
        }
        body |= {"stream": True, "stream_options": {"include_usage": True}, "tool": "none"}
        return json.dumps(body | SAMPLING | more).encode()


def engine_alone(config: Recipe, counts: list[int], secs: float) -> list[dict]:
    """Tokens a second when as many texts are written as there are clients."""
    _, model, mesh, params, tokenizer = open_model(config)
    engine = make_engine(model, mesh, tokenizer, slots=SLOTS, max_len=model.seq_len)
    engine.load(params)
    engine.warm_up()
    chats = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    prompts = [render_for_completion(tokenizer, chat) for chat in chats]
    rows = []
    for count in counts:
        number, tokens, running, began = 0, 0, 0, time.perf_counter()
        while (now := time.perf_counter()) < began + secs or running:
            while running < count and now < began + secs:
                prompt, sampling = prompts[number % len(prompts)], SAMPLING
                engine.submit(Request(prompt, ANSWER_TOKENS, seed=number, tool="none", **sampling))
                number, running = number + 1, running + 1
            for piece in engine.step():
                tokens += len(piece.tokens)
                running -= bool(piece.finish)
        value = tokens / (time.perf_counter() - began)
        rows.append({"what": f"engine alone, {count} texts", "value": value, "unit": "tok/s"})
    return rows


@asynccontextmanager
async def server(
    arguments: list[str], **options: Any
) -> AsyncIterator[tuple[Client, psutil.Process]]:
    """chat_web.py with these options, ended by SIGTERM."""
    command = [sys.executable, str(ROOT / "scripts/chat_web.py"), *arguments, "--port=0"]
    command += [f"--slots={SLOTS}", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        assert process.stdout
        async for line in process.stdout:
            if found := re.search(rb"ready after .*(http://\S+)", line):
                break
        else:
            raise UserError(f"{' '.join(command)} did not start; run it and see why")
        log(found[0].decode())
        reading = asyncio.create_task(process.stdout.read())  # its log goes nowhere
        yield Client(found[1].decode()), psutil.Process(process.pid)
        process.terminate()
        await asyncio.gather(process.wait(), reading)
    finally:
        if process.returncode is None:
            process.kill()


async def load_of(client: Client, count: int, secs: float) -> dict:
    """`count` clients, each of which asks again and again."""
    answers: list[list[dict]] = [[] for _ in range(count)]
    began = time.perf_counter()

    async def one(number: int) -> None:
        while time.perf_counter() < began + secs:
            answers[number].append(await client.ask(client.body(number)))
            number_of = len(answers[number])
            assert answers[number][-1].get("tokens"), (number_of, answers[number][-1])

    await asyncio.gather(*(one(number) for number in range(count)))
    elapsed = time.perf_counter() - began
    all = [answer for own in answers for answer in own]
    first = [answer["times"][0] for answer in all if answer["times"]]
    gaps = [gap for answer in all for gap in np.diff(answer["times"])]
    row = {"what": f"server, {count} clients", "unit": "tok/s"}
    row["value"] = sum(answer["tokens"] for answer in all) / elapsed
    for name, values in (("first", first), ("gap", gaps)):
        for percent in (50, 95, 99):
            row[f"{name} {percent}%, ms"] = 1e3 * float(np.percentile(values, percent))
    return row | {"fair": min(map(len, answers)) / max(map(len, answers))}


async def hostile(client: Client, count: int) -> dict:
    """What became of `count` requests, a fifth of them of bad will."""
    numbers = list(range(16))
    alone = {n: (await client.ask(client.body(n)))["text"] for n in numbers}
    rng, at_once, found = random.Random(0), asyncio.Semaphore(64), dict.fromkeys(KINDS, 0)
    wrong: list[str] = []

    async def one(kind: str, number: int) -> None:
        body, ways = (
            client.body(number),
            {"leaves": {"leave_after": number % 5}, "slow": {"pause": 0.05}},
        )
        if kind == "nonsense":
            body = rng.choice([body[:-9], b"[1]", b"\xff", body.replace(b'"user"', b"7"), b""])
        async with at_once:
            try:
                answer = await asyncio.wait_for(client.ask(body, **ways.get(kind, {})), 120)
            except TimeoutError:
                answer = {"status": "hung"}
        right = answer["status"] == (400 if kind == "nonsense" else 200) and "error" not in answer
        if kind in ("plain", "slow"):
            right = right and answer["text"] == alone[number]
        found[kind] += 1
        if not right:
            wrong.append(f"{kind} {number}: {answer}"[:300])

    kinds = rng.choices(KINDS, (70, 10, 10, 10), k=count)
    await asyncio.gather(*(one(kind, rng.choice(numbers)) for kind in kinds))
    for line in wrong[:5]:
        log(line)
    return {
        "what": f"hostile: {count} requests",
        "value": float(len(wrong)),
        "unit": "wrong",
    } | found


KINDS = ("plain", "leaves", "nonsense", "slow")


async def soak(client: Client, process: psutil.Process, secs: float) -> dict:
    """Memory after a tenth of the time, and what it grows by until the end."""
    loading = asyncio.create_task(load_of(client, 8, secs))
    await asyncio.sleep(secs / 10)
    early = process.memory_info().rss
    await loading
    late = process.memory_info().rss
    row = {"what": f"memory over {secs:.0f} s", "value": (late - early) / 2**20, "unit": "MiB more"}
    return row | {"MiB": late / 2**20}


async def late(client: Client, count: int) -> dict:
    """Requests whose time is up, then one that is short."""
    bodies = (client.body(n, max_tokens=200, logit_bias={}) for n in range(count))
    answers = await asyncio.gather(*(client.ask(body) for body in bodies))
    ended = sum("error" in answer or answer["status"] == 429 for answer in answers)
    began = time.perf_counter()
    answer = await client.ask(client.body(0, max_tokens=2))
    assert answer["tokens"], answer
    row = {"what": f"short one after {count} late ones", "unit": "s", "ended late": ended}
    return row | {"value": time.perf_counter() - began}


async def run(args: argparse.Namespace, arguments: list[str]) -> list[dict]:
    rows = []
    async with server(arguments) as (client, process):
        for count in args.clients:
            await load_of(client, count, 1.0)
            rows.append(await load_of(client, count, args.secs))
        if args.hostile:
            rows.append(await hostile(client, args.hostile))
        if args.soak_secs:
            rows.append(await soak(client, process, args.soak_secs))
    if args.late:
        async with server(arguments, timeout_secs=0.5, per_client=1000) as (client, _):
            rows.append(await late(client, args.late))
    return rows


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    for name, default in {"secs": 20.0, "hostile": 0, "soak-secs": 0.0, "late": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args, config = parser.parse_args(rest), load(path, overrides)
    arguments = [word for word in sys.argv[1:] if word.startswith("--config")]
    alone = engine_alone(config, args.clients, args.secs)
    rows = asyncio.run(run(args, arguments))
    for row, engine in zip(rows, alone, strict=False):
        row["of the engine"] = row["value"] / engine["value"]
    common.finish("serve", [*alone, *rows])


if __name__ == "__main__":
    run_main(main)

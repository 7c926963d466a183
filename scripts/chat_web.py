"""Serve a trained model: a chat page, and OpenAI's API for every client that speaks it.

  python scripts/chat_web.py --config=configs/demo.py      # then open http://127.0.0.1:8000

  --stage=NAME        rl, sft, mid or base; by default the latest that has a checkpoint. A base
                      model continues text (/v1/completions), it does not chat
  --host=ADDRESS      where to listen (127.0.0.1: this machine only)
  --port=N            (8000)
  --api-key=KEY       what clients must send; better in $NANOCHAT_API_KEY, which others cannot see
  --allow-public      listen on a public --host without a key
  --cors-origin=URL   a site whose pages may use this server (none)
  --slots=N           answers written at once, by each engine (32)
  --max-len=N         tokens of prompt and answer together (the model's context)
  --engines=N         copies of the model (one a device; with config.mesh.tensor=N, one on N)
  --max-queue=N       answers that may wait for a slot; then 429 (256)
  --per-client=N      answers of one address at once; then 429 (128)
  --timeout-secs=X    an answer that takes longer is ended (600)
  --tool=NAME         what a chat may call unasked: calculator, python (in a sandbox) or none
                      (calculator)

Ctrl-C or SIGTERM finishes the answers that are being written; a second one cuts them off.
"""

import os
import sys
import time
from argparse import Namespace

import jax
from fastapi import FastAPI

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.config import Recipe, load, parse_argv, parse_options
from nanochat_jax.inference.checkpoint import make_engine, open_model
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.report import live
from nanochat_jax.serve import guard, server
from nanochat_jax.serve.api import Served
from nanochat_jax.serve.guard import Access
from nanochat_jax.serve.worker import Pool
from nanochat_jax.stages.evals import progress_bar

OPTIONS = {"stage": "", "host": "127.0.0.1", "port": 8000, "api_key": "", "cors_origin": ""}
OPTIONS |= {"tool": "", "slots": 32, "max_len": 0, "engines": 0, "max_queue": 256}
OPTIONS |= {"per_client": 128, "timeout_secs": 600.0}
LEAST = {"slots": 1, "max_len": 0, "engines": 0, "max_queue": 0, "per_client": 1}


def arguments(words: list[str]) -> Namespace:
    args = parse_options(words, flags=["allow_public"], **OPTIONS)
    args.api_key = args.api_key or os.environ.get("NANOCHAT_API_KEY", "")
    for name, least in (LEAST | {"timeout_secs": 0.001}).items():
        if not (got := getattr(args, name)) >= least:
            raise UserError(f"--{name.replace('_', '-')} got {got}, expected {least} or more")
    return args


def make_server(args: Namespace, config: Recipe, access: Access) -> tuple[FastAPI, Pool]:
    """Engines of the run's model, warmed up, and the server over them."""
    found, model, mesh, params, tokenizer = open_model(config, args.stage or None)
    base, devices = found.stage == "base", jax.devices()
    if base and args.tool not in ("", "none"):
        log(f"--tool={args.tool} has no effect: a base model uses no tool")
    # What a chat may ask for, first what it gets unasked; programs only where --tool says so.
    tools = ("none",) if base else (args.tool or "calculator", "calculator", "none")
    tools = tuple(dict.fromkeys(tools))
    max_len, num = args.max_len or model.seq_len, mesh.size
    if max_len > model.seq_len:
        raise UserError(f"--max-len got {max_len}, expected at most the model's {model.seq_len}")
    most = len(devices) // num
    if (copies := args.engines or most) > most:
        raise UserError(f"--engines got {copies}, expected at most {most}, one on {num} device(s)")
    engines = []
    for number in range(copies):
        own = make_mesh(data=1, tensor=num, devices=devices[number * num :][:num])
        able = [tool for tool in tools if tool != "none"]
        sizes = {"slots": args.slots, "max_len": max_len}
        engine = make_engine(model, own, tokenizer, base=base, tools=able, **sizes)
        engine.load(params)
        what = "compiling all that an answer may need; the first time takes a minute or more"
        log(f"engine {number + 1} of {copies}: {what}")
        engine.warm_up(progress_bar("compiling"))
        engines.append(engine)
    limits = {"max_queue": args.max_queue, "per_client": args.per_client}
    pool = Pool(engines, **limits, timeout_secs=args.timeout_secs)
    made = Served(config.run.name, found.stage, found.step, max_len, model.vocab_size, tools)
    app = server.make_app(pool, tokenizer, made, access, int(time.time()))
    app.router.routes.extend(live.ROUTES)
    return app, pool


def main() -> int:
    began = time.monotonic()
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    args, config = arguments(rest), load(path, overrides)
    origins = [args.cors_origin] if args.cors_origin else []
    access = guard.access_of(args.host, args.api_key, args.allow_public, origins)
    with guard.open_socket(args.host, args.port) as sock:
        app, pool = make_server(args, config, access)
        url = guard.address(sock)
        greeting = [f"ready after {time.monotonic() - began:.1f} s; chat, and OpenAI's API: {url}"]
        greeting += [f"the run's report, and all runs: {url}/report"]
        server.serve(app, pool, sock, "\n".join(greeting))
    return 0


if __name__ == "__main__":
    run_main(main)

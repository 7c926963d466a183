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

import argparse
import os
import sys
import time

import jax
from fastapi import FastAPI

from nanochat_jax.common import UserError, log, run_main
from nanochat_jax.config import Recipe, load, parse_argv
from nanochat_jax.inference.checkpoint import make_engine, open_model
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.report import live
from nanochat_jax.serve import server
from nanochat_jax.serve.api import Served
from nanochat_jax.serve.server import Access
from nanochat_jax.serve.worker import Pool
from nanochat_jax.stages.evals import progress_bar


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--allow-public", action="store_true")
    options = {"stage": "", "host": "127.0.0.1", "port": 8000, "cors-origin": "", "tool": ""}
    options |= {"api-key": os.environ.get("NANOCHAT_API_KEY", ""), "slots": 32, "max-len": 0}
    options |= {"engines": 0, "max-queue": 256, "per-client": 128, "timeout-secs": 600.0}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise argparse.ArgumentError(None, f"unknown argument {unknown[0]!r}")
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help shows what there is") from None
    least = {"slots": 1, "max_len": 0, "engines": 0, "max_queue": 0, "per_client": 1}
    for name, value in least.items():
        if (got := getattr(args, name)) < value:
            raise UserError(f"--{name.replace('_', '-')} got {got}, expected {value} or more")
    if not args.timeout_secs > 0:
        raise UserError(f"--timeout-secs got {args.timeout_secs}, expected more than 0")
    return args


def make_server(args: argparse.Namespace, config: Recipe, access: Access) -> tuple[FastAPI, Pool]:
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
        log(f"engine {number + 1} of {copies}: compiling all that an answer may need")
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
    access = server.access_of(args.host, args.api_key, args.allow_public, origins)
    with server.open_socket(args.host, args.port) as sock:
        app, pool = make_server(args, config, access)
        host, port = sock.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        greeting = [f"ready after {time.monotonic() - began:.1f} s; chat, and OpenAI's API: {url}"]
        greeting += [f"the run's report, and all runs: {url}/report"]
        server.serve(app, pool, sock, "\n".join(greeting))
    return 0


if __name__ == "__main__":
    run_main(main)

"""Talk to a trained model in the terminal.

  python scripts/chat_cli.py --config=configs/demo.py           # a chat; /help lists commands
  python scripts/chat_cli.py --config=configs/demo.py -p "text" # the answer alone, for pipes

  -p TEXT             ask one question; only the answer goes to stdout. One that starts with a
                      dash: -p="-5+3?"
  --stage=NAME        rl, sft, mid or base; by default the latest that has a checkpoint. A base
                      model continues the text, it does not answer
  --temperature=X     0: always the most likely token (0.6)
  --top-k=N           sample among the N most likely tokens; 0: all (50)
  --max-new-tokens=N  length of an answer (256)
  --seed=N            the same seed and questions give the same answers (42)
  --system=TEXT       a system message
  --tool=NAME         calculator, python (in a sandbox) or none (calculator)
  --no-color          as $NO_COLOR does

Ctrl-C stops an answer, Ctrl-D leaves.
"""

import contextlib
import io
import sys

from nanochat_jax.common import run_main
from nanochat_jax.config import load, parse_argv, parse_options

OPTIONS = {"p": None, "stage": "", "system": "", "tool": "", "temperature": 0.6, "top_k": 50}
OPTIONS |= {"max_new_tokens": 256, "seed": 42}


def main() -> int:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    args, config = parse_options(rest, flags=["no_color"], **OPTIONS), load(path, overrides)
    from nanochat_jax.inference.checkpoint import make_engine, open_model  # JAX takes long
    from nanochat_jax.inference.request import Request
    from nanochat_jax.serve.terminal import Chat, Screen

    settings = Request((), args.max_new_tokens, args.temperature, args.top_k, seed=args.seed)
    interactive = args.p is None
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
        found, model, mesh, params, tokenizer = open_model(config, args.stage or None)
        base, tools = found.stage == "base", {"": ["calculator"], "none": []}
        sizes = {"slots": 1, "max_len": model.seq_len}
        engine = make_engine(
            model, mesh, tokenizer, base=base, tools=tools.get(args.tool, [args.tool]), **sizes
        )
        engine.load(params)
        if base and args.tool not in ("", "none"):
            print(f"--tool={args.tool} has no effect: a base model uses no tool")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    notes = sys.stdout if interactive else sys.stderr
    screen = Screen(sys.stdout, notes, interactive=interactive, no_color=args.no_color)
    chat = Chat(engine, tokenizer, settings, screen, args.system, base)
    if not interactive:
        return 130 if chat.ask(args.p) == "cancelled" else 0
    screen.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    chat.loop()
    return 0


if __name__ == "__main__":
    run_main(main)

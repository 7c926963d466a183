"""Answers to the problems of a task: many at once against one by one; one JSON line last.

  python scripts/bench/eval.py                                       # generated word problems
  python scripts/bench/eval.py --task="gsm8k test" --task-dir=DIR    # DIR/gsm8k/test.jsonl

Both are the same engine, once with many slots, once with one. The answers must be the same, but for
a few where rounding decides between ids that are equally likely: exit status 1 when more than
MAX_DIFFER_FRAC differ. The model is untrained, so every answer is as long as it may be.
"""

import sys
from functools import partial
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax.common import UserError, run_main
from nanochat_jax.inference.engine import Engine, Request
from nanochat_jax.inference.tools import calculator_tool
from nanochat_jax.model.gpt import init_params
from nanochat_jax.tasks.registry import open_task
from nanochat_jax.tokenizer import bpe
from nanochat_jax.tokenizer.chat import render_for_completion
from scripts.bench import common
from scripts.bench.common import Row

MAX_DIFFER_FRAC = 0.02


def main() -> int:
    parser = common.parser(__doc__, secs=0)
    parser.add_argument("--task", default="arithmetic test")
    parser.add_argument("--task-dir", default="", help="folder of the task's data")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=64)
    args = parser.parse_args()
    task = open_task(args.task, task_dir=args.task_dir)
    if args.problems > len(task):
        raise UserError(f"--problems got {args.problems}, expected 1 to {len(task)} of {args.task}")
    config = common.chosen_shapes(args)[0].model
    texts = (str(task[i]["messages"]) for i in range(min(len(task), 1000)))
    tokenizer = bpe.train(texts, config.vocab_size)
    prompts = [render_for_completion(tokenizer, task[i]) for i in range(args.problems)]
    params = init_params(config, jax.random.key(0))
    # Projections start as zeros; a model that says the same everywhere would be no test.
    noise = common.random_arrays("float32", *(value.shape for value in params.values()))
    params = {k: v + 0.05 * n for (k, v), n in zip(params.items(), noise, strict=True)}
    answers, calls = {}, {}

    def write(engine: Engine) -> None:
        found = engine.generate([Request(prompt, args.max_new_tokens) for prompt in prompts])
        answers[engine.slots] = [answer.tokens for answer in found]

    for slots in (args.slots, 1):
        engine = Engine(
            config,
            common.one_device(),
            slots=slots,
            max_len=max(map(len, prompts)) + args.max_new_tokens,
            stop_ids=(tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id),
            tool=calculator_tool(tokenizer),
        )
        engine.load(params)
        calls[f"{slots} at once"] = partial(write, engine)
    times = common.time_in_turn(calls, args.secs, min_rounds=2)
    differ = sum(one != many for one, many in zip(answers[1], answers[args.slots], strict=True))
    note = f"{differ} of {args.problems} answers differ"
    rows = [Row(name, *timing, note=note) for name, timing in times.items()]
    common.finish("eval", rows, settings=vars(args), num_differ=differ)
    return int(differ > MAX_DIFFER_FRAC * args.problems)


if __name__ == "__main__":
    run_main(main)

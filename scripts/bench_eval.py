"""A generative evaluation of many problems: in batches through the engine, and one by one.

  python scripts/bench_eval.py                                       # generated word problems
  python scripts/bench_eval.py --task="gsm8k test" --task-dir=DIR    # DIR/gsm8k/test.jsonl

Both are the same engine and the same function, once with many slots, once with one; the same
answers must come out, but for a few where rounding decides between ids that are equally likely:
exit status 1 when more than MAX_DIFFER_FRAC of them differ. The model is untrained (d4), so every
answer is as long as it may be. Compilation is not counted: each is warmed up with every prompt and
with every length of the cache first.
"""

import time
from collections.abc import Sequence

import jax

from nanochat_jax import bench
from nanochat_jax.common import UserError, run_main
from nanochat_jax.eval.chat import generative
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.tools import make_tool
from nanochat_jax.model.gpt import init_params
from nanochat_jax.tasks.base import Conversation, Task
from nanochat_jax.tasks.registry import Selection, open_task
from nanochat_jax.tokenizer import bpe
from nanochat_jax.tokenizer.chat import render_for_completion

MAX_DIFFER_FRAC = 0.02
WARM_UP_TOKENS = 2  # of an answer: its prompt is what has to be compiled


class Heard(Task):
    """A task that keeps the answers it was asked to grade."""

    def __init__(self, task: Task):
        self.task, self.answers = task, []

    def __len__(self) -> int:
        return len(self.task)

    def example(self, index: int) -> Conversation:
        return self.task.example(index)

    def grade(self, answers: Sequence[tuple[int, str]]) -> list[bool]:
        self.answers = list(answers)
        return self.task.grade(answers)


def main() -> int:
    parser = bench.parser(__doc__, secs=0)
    parser.add_argument("--task", default="arithmetic test")
    parser.add_argument("--task-dir", default="", help="folder of the task's data")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=64)
    args = parser.parse_args()
    most = args.max_new_tokens
    task = open_task(args.task, task_dir=args.task_dir)
    if not 1 <= args.problems <= len(task):
        raise UserError(f"--problems got {args.problems}, expected 1 to {len(task)} of {args.task}")
    texts = (str(task[i]["messages"]) for i in range(min(len(task), 1000)))
    shape = bench.get_shape(args.shape or "d4")
    tokenizer = bpe.train(texts, shape.model.vocab_size)
    params = init_params(shape.model, jax.random.key(0))
    # Projections start as zeros; a model that says the same everywhere would be no test.
    keys = jax.random.split(jax.random.key(1), len(params))
    noise = zip(params.items(), keys, strict=True)
    params = {k: v + 0.05 * jax.random.normal(key, v.shape) for (k, v), key in noise}
    lengths = [len(render_for_completion(tokenizer, task[i])) for i in range(args.problems)]
    longest, shortest = lengths.index(max(lengths)), lengths.index(min(lengths))
    every, ends = Selection(task, range(args.problems)), [shortest, longest, shortest]

    secs, answers = {}, {}
    for slots in (args.slots, 1):
        engine = Engine(
            shape.model,
            bench.one_device(),
            slots=slots,
            max_len=max(lengths) + most,
            stop_ids=(tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id),
            tool=make_tool("calculator", tokenizer),
        )
        engine.load(params)

        # Compile every shape that will come: prompts first, then lengths of the cache.
        generative(engine, tokenizer, every, max_new_tokens=min(WARM_UP_TOKENS, most))
        generative(engine, tokenizer, Selection(task, ends), max_new_tokens=most)
        heard = Heard(every)
        began = time.perf_counter()
        generative(engine, tokenizer, heard, max_new_tokens=most)
        secs[slots], answers[slots] = time.perf_counter() - began, heard.answers
        print(f"{slots:>3} at once: {secs[slots]:.1f}s for {args.problems} problems")
    ratio = secs[1] / secs[args.slots]
    print(f"in batches {ratio:.1f}x as fast as one by one")
    pairs = zip(answers[1], answers[args.slots], strict=True)
    num_differ = sum(one != batched for one, batched in pairs)
    print(f"{num_differ} of {args.problems} answers differ")
    result = {"bench": "eval", "task": args.task, "problems": args.problems}
    result |= {"max_new_tokens": args.max_new_tokens, "slots": args.slots, "num_differ": num_differ}
    bench.finish(result | {"secs_batched": secs[args.slots], "secs_one": secs[1], "ratio": ratio})
    return int(num_differ > MAX_DIFFER_FRAC * args.problems)


if __name__ == "__main__":
    run_main(main)

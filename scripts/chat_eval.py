"""Score a chat model: multiple choice, word problems, programs, spelling; and ChatCORE.

  python scripts/chat_eval.py --config=configs/d20.py --config.eval.chat_stage=rl
  python scripts/chat_eval.py --config=configs/d20.py --config.eval.chat_tasks='("gsm8k test",)'

Writes $NANOCHAT_BASE_DIR/runs/<config.run.name>/eval/<stage>_chat.json after each task.
"""

from nanochat_jax.common import run_main
from nanochat_jax.config import load_from_argv
from nanochat_jax.stages import evals as stages_eval


def main() -> None:
    stages_eval.run_chat_eval(load_from_argv(__doc__))


if __name__ == "__main__":
    run_main(main)

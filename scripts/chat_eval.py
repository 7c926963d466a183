"""Score a chat model: multiple choice, word problems, programs, spelling; and ChatCORE.

  python scripts/chat_eval.py --config=configs/d20.py --config.eval.chat_stage=rl
  python scripts/chat_eval.py --config=configs/d20.py --config.eval.chat_tasks='("gsm8k test",)'

Writes $NANOCHAT_BASE_DIR/runs/<config.run.name>/eval/<stage>_chat.json after each task.
"""

from nanochat_jax.config import run_stage
from nanochat_jax.stages import evals

if __name__ == "__main__":
    run_stage(evals.run_chat_eval, __doc__)

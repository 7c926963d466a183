"""Evaluate a recipe's base model: bits per byte on both texts, CORE, samples, answers.

  python scripts/base_eval.py --config=configs/d20.py

Writes $NANOCHAT_BASE_DIR/runs/<config.run.name>/eval/base.json.
"""

from nanochat_jax.config import run_stage
from nanochat_jax.stages import evals

if __name__ == "__main__":
    run_stage(evals.run_base_eval, __doc__)

"""Evaluate a recipe's base model: bits per byte on training and validation text, samples.

  python scripts/base_eval.py --config=configs/d20.py

Writes $NANOCHAT_BASE_DIR/runs/<config.run.name>/eval/base.json.
"""

from nanochat_jax.common import run_main
from nanochat_jax.config import load_from_argv
from nanochat_jax.stages import evals as stages_eval


def main() -> None:
    stages_eval.run_base_eval(load_from_argv(__doc__))


if __name__ == "__main__":
    run_main(main)

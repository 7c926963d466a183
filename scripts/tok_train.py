"""Train the tokenizer of a run on the beginning of its pretraining text.

python scripts/tok_train.py --config=configs/demo.py
"""

from nanochat_jax.config import Recipe, run_stage
from nanochat_jax.stages import text


def main(config: Recipe) -> None:
    text.run_tokenizer(config)  # it returns the tokenizer, which is no exit status


if __name__ == "__main__":
    run_stage(main, __doc__)

"""Train the tokenizer of a run on the beginning of its pretraining text.

python scripts/tok_train.py --config=configs/demo.py
"""

from nanochat_jax.common import run_main
from nanochat_jax.config import load_from_argv
from nanochat_jax.stages import text as stages_text


def main() -> None:
    stages_text.run_tokenizer(load_from_argv(__doc__))


if __name__ == "__main__":
    run_main(main)

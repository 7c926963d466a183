"""Measure how the tokenizer of a run compresses several kinds of text, beside GPT-2's and GPT-4's.

python scripts/tok_eval.py --config=configs/demo.py
"""

from nanochat_jax.common import run_main
from nanochat_jax.config import load_from_argv
from nanochat_jax.stages import text as stages_text


def main() -> None:
    stages_text.run_tok_eval(load_from_argv(__doc__))


if __name__ == "__main__":
    run_main(main)

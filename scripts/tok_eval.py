"""Measure how the tokenizer of a run compresses several kinds of text, beside GPT-2's and GPT-4's.

python scripts/tok_eval.py --config=configs/demo.py
"""

from nanochat_jax.config import run_stage
from nanochat_jax.stages import text

if __name__ == "__main__":
    run_stage(text.run_tok_eval, __doc__)

"""Train the tokenizer of a run on the beginning of its pretraining text.

python scripts/tok_train.py --config=configs/demo.py
"""

from nanochat_jax.config import run_stage
from nanochat_jax.stages import text

if __name__ == "__main__":
    # Without the tokenizer that comes back, which is no exit status.
    run_stage(lambda config: text.run_tokenizer(config) and None, __doc__)

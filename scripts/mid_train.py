"""Mid-training: the base model learns conversations, multiple choice and tools.

  python scripts/mid_train.py --config=configs/d20.py

Starts from the last checkpoint of train.py, or continues where it was. A recipe without a mid
mixture (gpt2.py) has no such stage. Ctrl-C or SIGTERM saves and exits with status 75.
"""

from nanochat_jax.config import run_stage
from nanochat_jax.stages.chat import Mid
from nanochat_jax.stages.train import train_stage

if __name__ == "__main__":
    run_stage(lambda config: train_stage(config, Mid), __doc__)

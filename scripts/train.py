"""Pretrain the base model of a recipe; continues where it was, or says that it is complete.

  python scripts/train.py --config=configs/d20.py
  python scripts/train.py --config=configs/demo.py --config.model.depth=6 --config.run.name=d6

Makes data and tokenizer first if they are not there. Ctrl-C or SIGTERM saves and exits with status
75.
"""

from nanochat_jax.config import run_stage
from nanochat_jax.stages.base import Base
from nanochat_jax.stages.train import train_stage

if __name__ == "__main__":
    run_stage(lambda config: train_stage(config, Base), __doc__)

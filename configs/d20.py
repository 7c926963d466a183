"""d20, classic: the $100 speedrun, 561M parameters, 11.2B tokens.

  bash speedrun.sh                                  # picks this recipe where there are 8 GPUs
  python scripts/train.py --config=configs/d20.py

Upstream's run of this recipe: 3h51m for all stages on 8xH100, CORE 0.2219.
One step is 8 GPUs x 32 rows x 2,048 tokens = 524,288 tokens, without accumulation.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.run.name = "d20"
    c.model.depth = 20
    c.data.packing = "stream"  # as upstream then; best_fit would need 325 shards for one epoch
    c.data.num_shards = 240  # 11.2B tokens * 4.8 characters = 54B; 250M a shard, some spare
    return c

"""d26, classic: a bigger sister of d20, about 12 hours on 8xH100.

python scripts/train.py --config=configs/d26.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.run.name = "d26"
    c.model.depth = 26
    c.data.packing = "stream"
    c.data.num_shards = 450
    c.base.device_batch_size = 16  # 80 GB hold no more; accumulation keeps the step the same
    c.mid.device_batch_size = 16
    return c

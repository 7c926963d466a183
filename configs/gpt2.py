"""d24, modern: GPT-2's CORE score as fast as possible ("time to GPT-2").

  CONFIG=configs/gpt2.py bash speedrun.sh

Upstream's run of this recipe: 1.65 h on 8xH100 (with fp8), CORE 0.2626, val bpb 0.718.
"""

from ml_collections import ConfigDict

from configs import default


def modern(c: ConfigDict) -> ConfigDict:
    """Architecture, optimizer and schedule of the modern recipe, for any depth."""
    c.tokenizer.vocab_size = 32_768
    c.model.update(rope_base=100_000.0, window_pattern="SSSL", qk_scale=1.2, round_width=True)
    c.model.update(extras=True, embed_init_std=0.8, fc_init_scale=0.4)
    c.optim.update(recipe="modern", unembed_lr=0.008, weight_decay=0.28, grad_clip=0.0)
    c.optim.update(momentum=0.97, momentum_end=0.90, momentum_warmup_steps=400)
    c.optim.scale_by_batch = True
    c.base.update(horizon_params="matrices_and_head", tokens_per_param=12.0)
    c.base.update(warmup_steps=40, warmdown_frac=0.65, final_lr_frac=0.05)
    c.mid.mixture = ()  # folded into SFT
    # Upstream's, and three that it dropped: who the assistant is (identity), and how words are
    # spelled and letters counted.
    c.sft.mixture = (
        "smoltalk train",
        "mmlu auxiliary_train x3",
        "gsm8k train x4",
        "identity train x2",
        "simple_spelling train[:200000]",
        "spelling_bee train[:80000]",
    )
    c.sft.update(val_mixture=c.mid.val_mixture, packing="best_fit", warm_start=True)
    c.sft.update(batch_rows=0, device_batch_size=16)  # as many rows a step as in base
    c.sft.update(lr_frac=0.8, embed_lr=c.optim.embed_lr, unembed_lr=c.optim.unembed_lr)
    c.sft.update(momentum_warmup_steps=300, warmdown_frac=0.5)
    return c


def get_config() -> ConfigDict:
    c = modern(default.get_config())
    c.run.name = "gpt2"
    c.model.depth = 24
    c.data.name = "climbmix"
    c.data.num_shards = 170
    c.base.tokens_per_param = 8.0  # the speedrun stops short of compute-optimal
    c.base.device_batch_size = 16
    return c

"""Demo: a whole ChatGPT's life on a laptop, without network or GPU, in minutes.

  bash speedrun.sh                     # picks this recipe where there is no GPU

The modern recipe, small: human small talk and Python's documentation, 11 MB of text. What comes out
speaks in sentences and knows nothing. Measured times and scores: dev/BENCHMARKS.md.
"""

from ml_collections import ConfigDict

from configs import default, gpt2

PROMPTS = (
    "Hi! How are you?",
    '"What did you do today?"\n"',
    "My favorite food is",
    "I think that",
    "The function returns",
)
MID_MIXTURE = (
    "chitchat train[:2000]",
    "identity train[:500]",
    "arithmetic train[:1500]",
    "spelling_bee train[:3000]",
    "simple_spelling train[:3000]",
)
SFT_MIXTURE = (
    "chitchat train[2000:2500]",
    "identity train[500:]",
    "arithmetic train[1500:2000]",
    "spelling_bee train[3000:6000]",
    "simple_spelling train[3000:8000]",
)


def get_config() -> ConfigDict:
    c = gpt2.modern(default.get_config())
    c.run.name = "demo"
    c.tokenizer.vocab_size = 4_096
    c.data.update(name="demo", num_lanes=4)
    c.data.packing = "stream"  # best_fit would cut two fifths of so little text away
    c.model.update(depth=4, aspect_ratio=48, head_dim=64, seq_len=256)
    c.optim.scale_by_batch = False  # its reference, half a million tokens a step, is too far away
    c.base.update(num_steps=400, total_batch_tokens=8_192, device_batch_size=32)
    c.base.update(eval_every=100, sample_every=200, save_every=100)
    c.mid.update(mixture=MID_MIXTURE, packing="best_fit", warm_start=True)
    c.mid.update(embed_lr=c.optim.embed_lr, unembed_lr=c.optim.unembed_lr)
    c.sft.update(mixture=SFT_MIXTURE, device_batch_size=32, lr_frac=0.5)
    for stage in (c.mid, c.sft):
        stage.val_mixture = ("chitchat test", "arithmetic test", "spelling_bee test")
        stage.update(eval_every=50, save_every=50)
    c.rl.update(task="arithmetic train", val_task="arithmetic test", num_steps=20)
    c.rl.update(questions_per_step=64, samples=8, max_new_tokens=80, device_batch_size=64)
    c.rl.update(lr_frac=0.2, scalar_frac=0.0, unembed_lr=c.optim.unembed_lr)
    c.rl.embed_lr = 0.02  # so few rewards move rare tokens at random
    c.rl.update(eval_every=10, save_every=10, eval_questions=256, eval_samples=4)
    c.eval.update(core=False, val_tokens=262_144, prompts=PROMPTS, sample_tokens=48)
    c.eval.chat_tasks = ("arithmetic test", "spelling_bee test", "simple_spelling test")
    c.eval.update(chat_problems=512, chat_max_new_tokens=96)
    return c

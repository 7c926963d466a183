"""Every key there is, with its unit: the base that all recipes state their differences from.

The values are the classic recipe ("the best ChatGPT that $100 can buy"). `derived(kind)` means:
worked out from other keys by nanochat_jax/recipe.py, which prints the value and its formula; set it
to override.
"""

from ml_collections import ConfigDict

from nanochat_jax.config import derived

PROMPTS = (  # continued greedily to see what the model knows
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def get_config() -> ConfigDict:
    c = ConfigDict(
        {s: ConfigDict() for s in ("run", "mesh", "tokenizer", "data", "model", "optim")}
    )

    c.run.name = "default"  # results go to $NANOCHAT_BASE_DIR/runs/<name>/
    c.run.seed = 42  # of the initial weights
    c.run.tracker = "none"  # none | wandb | trackio; metrics.jsonl is always written
    c.run.compile_cache = True  # keep compiled programs in $NANOCHAT_BASE_DIR/compile_cache

    # Devices form a grid data x fsdp x tensor. Rows of a batch are split over data and fsdp,
    # weights over fsdp and tensor.
    c.mesh.data = derived(int)  # copies of the model: devices / (fsdp * tensor)
    c.mesh.fsdp = 1  # ways to split weights and optimizer state, gathered when used
    c.mesh.tensor = 1  # ways to split heads, MLP and vocabulary
    c.mesh.coordinator = ""  # host:port of process 0 of a multi-process run; empty: one process
    c.mesh.num_processes = 1  # processes of a multi-process run
    c.mesh.process_id = 0  # this process, from 0

    c.tokenizer.vocab_size = 65_536  # ids, the 9 special tokens included
    c.tokenizer.train_chars = 2_000_000_000  # characters to train on
    c.tokenizer.doc_chars = 10_000  # characters of each document that count

    c.data.name = "fineweb_edu"  # climbmix | fineweb_edu | local | demo
    c.data.local_dir = ""  # for local: a folder of .parquet (column text), .jsonl, .txt, .md
    c.data.num_shards = 240  # training shards to download, about 250M characters each
    c.data.packing = "best_fit"  # best_fit: rows start with BOS | stream: one endless flow of text
    c.data.buffer_docs = 1_000  # documents a best_fit lane chooses from
    c.data.num_lanes = 8  # independent streams of rows; a multiple of the number of processes
    c.data.num_workers = 0  # 0: prefetch in a thread | 1: in a process of its own
    c.data.prefetch_batches = 4  # batches made ahead of the device

    c.model.depth = 20  # the one dial: layers, and by it width, horizon and cost
    c.model.aspect_ratio = 64  # width per layer
    c.model.head_dim = 128  # wished-for width of a head
    c.model.model_dim = derived(int)  # depth * aspect_ratio
    c.model.round_width = False  # modern: width up to whole heads; classic: heads divide it
    c.model.num_heads = derived(int)  # query heads
    c.model.num_kv_heads = derived(int)  # key/value heads: num_heads, fewer for GQA
    c.model.seq_len = 2_048  # tokens a row
    c.model.rope_base = 10_000.0  # wavelength base of the rotary embedding
    c.model.window_pattern = "L"  # L full, S a quarter of the context; last layer L
    c.model.qk_scale = 1.0  # factor on normalised queries and keys
    c.model.extras = False  # modern: value embeddings, residual scalars, smear, backout
    c.model.embed_init_std = 1.0  # of the token embedding
    c.model.fc_init_scale = 1.0  # of the first MLP matrix, times 1/sqrt(model_dim)
    c.model.compute_dtype = derived(str)  # bfloat16 on GPU, float32 on CPU; masters are float32
    c.model.remat = "none"  # none: keep activations | full: recompute each block backwards
    c.model.loss_tile_tokens = derived(int)  # tokens whose logits exist at once: 512 CPU, 8192 GPU

    c.optim.recipe = "classic"  # classic | modern: Muon's form, AdamW betas and decay by group
    c.optim.embed_lr = 0.3  # token embedding, times (model_dim/768)^-0.5
    c.optim.unembed_lr = 0.004  # head, times (model_dim/768)^-0.5
    c.optim.matrix_lr = 0.02  # Muon
    c.optim.scalar_lr = 0.5  # x0 scalars; a hundredth of it for residual scalars
    c.optim.smear_lr = 0.2  # smear and backout
    c.optim.weight_decay = 0.0  # Muon's; modern: cautious, cosine to 0
    c.optim.momentum_start = 0.85  # Muon's momentum at step 0
    c.optim.momentum = 0.95  # after momentum_warmup_steps
    c.optim.momentum_end = 0.95  # at the end of the warmdown
    c.optim.momentum_warmup_steps = 300
    c.optim.grad_clip = 1.0  # global norm; 0: off
    c.optim.scale_by_batch = False  # modern: LRs by sqrt(batch/2^19), decay by that and by horizon

    c.base = ConfigDict()
    c.base.num_steps = derived(int)  # horizon tokens / total_batch_tokens
    c.base.horizon_params = "all"  # parameters the horizon counts: all | matrices_and_head
    c.base.tokens_per_param = 20.0  # horizon: tokens per parameter
    c.base.total_batch_tokens = derived(int)  # tokens a step: 2^19, or by scale_by_batch
    c.base.device_batch_size = 32  # rows a device holds at once; the rest is accumulated
    c.base.warmup_steps = 0  # LR from 0
    c.base.warmdown_frac = 0.4  # of the steps, at the end, linear to final_lr_frac
    c.base.final_lr_frac = 0.0
    c.base.eval_every = 250  # steps between validations; 0: only at the end
    c.base.sample_every = 2_000  # steps between samples; 0: only at the end
    c.base.save_every = 500  # steps between checkpoints; 0: only at the end
    c.base.keep_checkpoints = 2  # newest ones kept, besides the best

    c.eval = ConfigDict()
    c.eval.val_tokens = 20 * 524_288  # tokens of validation (and training) text for bits per byte
    c.eval.device_batch_size = 32  # rows a device holds at once
    c.eval.prompts = PROMPTS  # continued greedily
    c.eval.sample_tokens = 16  # new tokens a sample
    c.eval.trigram_tokens = 0  # train a trigram yardstick on so many tokens; 0: none
    return c.lock()

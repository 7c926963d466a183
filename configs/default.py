"""Every key there is, with its unit: the base that all recipes state their differences from.

The values are the classic recipe ("the best ChatGPT that $100 can buy"). `derived(kind)` means:
worked out from other keys by nanochat_jax/recipe.py, value and formula printed; set it to override.
"""

from ml_collections import ConfigDict

from nanochat_jax.config import derived

SECTIONS = ("run", "mesh", "tokenizer", "data", "model", "optim", "base", "eval")
PROMPTS = (  # continued greedily to see what the model knows
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)

CHAT_PROMPTS = ("Hi! How are you?", "Who are you?", "What is 12+30?", "How do you spell apple?")

MID_MIXTURE = (
    "smoltalk train",
    "mmlu auxiliary_train",
    "gsm8k train",
    "identity train x2",
    "simple_spelling train[:200000]",
    "spelling_bee train[:80000]",
)
MID_VAL_MIXTURE = ("smoltalk test[:24000]", "mmlu test[:5200]", "gsm8k test[:420]")
SFT_MIXTURE = (
    "arc_easy train",
    "arc_challenge train",
    "gsm8k train",
    "smoltalk train[:10000]",
    "identity train",
    "simple_spelling train[:300]",
    "spelling_bee train[:300]",
)
CHAT_TASKS = (
    "arc_easy test",
    "arc_challenge test",
    "mmlu test",
    "gsm8k test",
    "humaneval test",
    "spelling_bee test",
)


def training_keys(**own) -> ConfigDict:
    """The keys that mid, sft and rl share, with mid's values; `own`: those that differ."""
    s = ConfigDict()
    s.num_steps = 0  # stop after so many; 0: all of the mixture or of the questions, once
    s.device_batch_size = 32  # rows a device holds at once, at most; the rest is accumulated
    s.lr_frac = 1.0  # of optim's learning rates
    s.embed_lr = 0.2  # instead of optim.embed_lr
    s.unembed_lr = 0.004  # instead of optim.unembed_lr
    s.scalar_frac = 1.0  # of lr_frac, for scalars and smear; 0: they stay
    s.weight_decay = 0.0  # Muon's
    s.momentum = 0.95  # Muon's, after a rise from optim.momentum_start
    s.momentum_warmup_steps = 300  # steps of that rise
    s.warmdown_frac = 0.2  # of the steps, at the end, linear to final_lr_frac
    s.final_lr_frac = 0.0  # of the learning rate, at the end
    s.eval_every = 150  # steps between validations, in rl by pass@k; 0: only at the end
    s.save_every = 150  # steps between checkpoints; 0: only at the end
    s.keep_checkpoints = 2  # newest ones kept, besides the best
    s.update(own)
    return s


def conversation_keys(**own) -> ConfigDict:
    """What mid and sft share besides, with mid's values."""
    s = training_keys()
    s.mixture = ()  # tasks to train on; empty: no such stage
    s.val_mixture = ()  # tasks for bits per byte; empty: no validation
    s.packing = "stream"  # stream | best_fit: whole chats, then padding | rows: one each
    s.train_on = "all"  # all tokens | assistant: what the assistant says
    s.batch_rows = 0  # rows a step; 0: as many as in base
    s.warm_start = False  # go on with the optimizer's moments of the stage before
    s.update(own)
    return s


def get_config() -> ConfigDict:
    c = ConfigDict({name: ConfigDict() for name in SECTIONS})

    c.run.name = "default"  # results go to $NANOCHAT_BASE_DIR/runs/<name>/
    c.run.seed = 42  # of the initial weights
    c.run.tracker = "none"  # none | wandb | trackio; metrics.jsonl is always written
    c.run.compile_cache = True  # keep compiled programs in $NANOCHAT_BASE_DIR/compile_cache
    c.run.profile = ""  # trace these steps, first:last from 0, like 20:24, into <stage>/profile/

    # Devices form a grid data x fsdp x tensor. Rows of a batch are split over data and fsdp.
    # Masters and optimizer state are shared out over all devices; a step gathers the weights it
    # needs.
    c.mesh.data = derived(int)  # devices / (fsdp * tensor)
    c.mesh.fsdp = 1  # ways to split the weights in evaluation and inference; in training as data
    c.mesh.tensor = 1  # ways to split heads, MLP and vocabulary
    # A run of several processes; the launcher's own variables are found without any of these.
    c.mesh.launcher = "auto"  # auto | none | flags | slurm | openmpi | kubernetes: who started them
    c.mesh.coordinator = ""  # host:port of process 0; empty: as the launcher says
    c.mesh.num_processes = 1  # for flags: processes, all machines together
    c.mesh.process_id = 0  # for flags: this process, from 0
    c.mesh.local_device_ids = ""  # GPUs of this process, like 0,1; empty: all, or its own by turns

    c.tokenizer.vocab_size = 65_536  # ids, the 9 special tokens included
    c.tokenizer.train_chars = 2_000_000_000  # characters to train on
    c.tokenizer.doc_chars = 10_000  # characters of each document that count

    c.data.name = "fineweb_edu"  # climbmix | fineweb_edu | local | demo
    c.data.local_dir = ""  # for local: a folder of .parquet (column text), .jsonl, .txt, .md
    c.data.num_shards = 240  # training shards to download, about 250M characters each
    c.data.packing = "best_fit"  # best_fit: rows start with BOS | stream: one endless flow of text
    c.data.buffer_docs = 1_000  # documents a best_fit lane chooses from
    c.data.num_lanes = 8  # independent streams of rows; a multiple of the number of processes
    c.data.prefetch_batches = 4  # batches made ahead of the device
    c.data.task_dir = ""  # folder with the tasks' data (gsm8k/, mmlu/, ...); empty: from the hub
    c.data.persona = ""  # persona file (TOML) of the task identity; empty: configs/persona.toml

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
    c.model.attention = "auto"  # auto: the fastest to pass its self-test | cudnn | xla | blocked
    c.model.remat = "auto"  # recompute backwards: none | names: what is cheap | full | auto: to fit
    c.model.fp8_layers = ()  # matmuls trained in fp8 on Hopper or later: of "attn", "mlp", "head"
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
    c.optim.momentum_warmup_steps = 300  # in base
    c.optim.grad_clip = 1.0  # global norm, in base; 0: off
    c.optim.scale_by_batch = False  # modern: LRs by sqrt(batch/2^19), decay by that and by horizon

    c.base.num_steps = derived(int)  # horizon tokens / total_batch_tokens
    c.base.horizon_params = "all"  # parameters the horizon counts: all | matrices_and_head
    c.base.tokens_per_param = 20.0  # horizon: tokens per parameter
    c.base.total_batch_tokens = derived(int)  # tokens a step: 2^19, or by scale_by_batch
    c.base.device_batch_size = 32  # rows a device holds at once, at most; the rest is accumulated
    c.base.warmup_steps = 0  # LR from 0
    c.base.warmdown_frac = 0.4  # of the steps, at the end, linear to final_lr_frac
    c.base.final_lr_frac = 0.0  # of the learning rate, at the end
    c.base.eval_every = 250  # steps between validations; 0: only at the end
    c.base.core_every = 2_000  # steps between CORE scores on eval.core_loop_per_task; 0: never
    c.base.sample_every = 2_000  # steps between samples; 0: only at the end
    c.base.save_every = 500  # steps between checkpoints; 0: only at the end
    c.base.keep_checkpoints = 2  # newest ones kept, besides the best

    # Stages after pretraining. A mixture names its tasks: "name split[first:last] xtimes"
    # (nanochat_jax/tasks/registry.py). Without tasks a stage is left out.
    c.mid = conversation_keys(mixture=MID_MIXTURE, val_mixture=MID_VAL_MIXTURE)
    c.sft = conversation_keys(mixture=SFT_MIXTURE, val_mixture=("smoltalk test[:3200]",))
    c.sft.update(packing="rows", train_on="assistant", batch_rows=32, device_batch_size=4)
    c.sft.update(lr_frac=0.02, momentum_warmup_steps=0, warmdown_frac=1.0)
    c.sft.update(eval_every=100, save_every=200)

    c.rl = training_keys(device_batch_size=8, eval_every=60, save_every=60)
    c.rl.update(lr_frac=0.05, momentum_warmup_steps=0, warmdown_frac=1.0)
    c.rl.task = "gsm8k train"  # questions to practise on; empty: no such stage
    c.rl.val_task = "gsm8k test"  # questions of pass@k
    c.rl.seed = 0  # of the order of the questions and of the answers
    c.rl.questions_per_step = 16  # each answered samples times
    c.rl.samples = 16  # answers to each question
    c.rl.pass_rows = 8  # answers whose tokens are averaged together; divides samples
    c.rl.max_new_tokens = 256  # tokens an answer
    c.rl.temperature = 1.0  # of the sampled answers; more than 0
    c.rl.top_k = 50  # most likely tokens to sample from; 0: all
    c.rl.slots = 256  # answers written at once, on all devices together
    c.rl.eval_questions = 400  # of val_task
    c.rl.eval_samples = 8  # answers to each; pass@k for k up to it

    c.eval.val_tokens = 20 * 524_288  # tokens of validation (and training) text for bits per byte
    c.eval.device_batch_size = 32  # rows a device holds at once
    c.eval.prompts = PROMPTS  # continued greedily
    c.eval.sample_tokens = 16  # new tokens a sample
    c.eval.core = True  # score the base model on CORE's 22 tasks
    c.eval.core_dir = ""  # folder of the CORE bundle; empty: downloaded
    c.eval.core_per_task = 0  # questions a task, more than 10; 0: all
    c.eval.core_loop_per_task = 500  # questions a task while the base model trains
    c.eval.chat_stage = "sft"  # whose model chat_eval scores: base | mid | sft | rl
    c.eval.chat_tasks = CHAT_TASKS  # tasks with right answers, in the grammar of a mixture
    c.eval.chat_prompts = CHAT_PROMPTS  # answered greedily after each stage, for the report
    c.eval.chat_problems = 0  # problems a task; 0: all
    c.eval.chat_max_new_tokens = 512  # tokens an answer
    c.eval.chat_samples = 1  # answers to each generative problem; one right one is enough
    c.eval.chat_temperature = 0.0  # 0: the most likely token
    c.eval.chat_top_k = 50  # most likely tokens to sample from; 0: all
    c.eval.chat_slots = 64  # answers written at once, on all devices together
    return c.lock()

"""What a run writes, made by hand."""

import json

HARDWARE = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "num_devices": 8}
FACTS = {"hardware": HARDWARE, "num_steps": 20, "started_unix_secs": 1.79e9, "wall_secs": 3540.0}
FACTS |= {"command": "/somewhere/scripts/train.py --config=configs/d20.py --config.run.name=mine"}
FACTS |= {"params": {"wte": 3_000_000, "lm_head": 1_000_000, "total": 4_000_000}}
FACTS |= {"flops_per_token": 7.912e9, "tokens_per_step": 8192, "peak_flops": 8 * 989e12}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def write_stage(run, name, lines=(), seed=42, **info):
    own = {"packing": "rows" if name == "sft" else "best_fit"}
    config = {"model": {"depth": 20}, "data": {"name": "fineweb"}, "run": {"seed": seed}, name: own}
    write(run / name / "config.json", config)
    write(run / name / "run_info.json", FACTS | info)
    write(run / name / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def steps(number, **values):
    """Training lines: the first step takes 30 s, because it compiles, the others 0.25 s."""
    return [
        {"kind": "train", "step": step, "loss": 9.0 - step / 10, "loss_ema": 9.5 - step / 10}
        | {"tokens": 100 + step, "step_secs": 0.25 if step else 30.0, "grad_norm": 1.0}
        | {"elapsed_secs": 30.0 + step * 0.25, **values}
        for step in range(number)
    ]

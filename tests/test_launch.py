"""The files of launch/: they parse, and what they promise fits what the code does."""

import re
import subprocess

import pytest
import yaml

from nanochat_jax import config as cfg
from nanochat_jax.common import EXIT_RESUME_ME
from nanochat_jax.launch.cluster import Launch, find

ROOT = cfg.CONFIGS.parent
LAUNCH = ROOT / "launch"


def shell_parses(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def keys_and_files_exist(script: str) -> None:
    known = cfg.flatten(cfg.load(cfg.CONFIGS / "default.py"))
    assert set(re.findall(r"--config\.(\w+\.\w+)", script)) <= set(known)
    for path in re.findall(r"(?:^|[ =])((?:scripts|configs|launch)/[\w./]+|speedrun\.sh)", script):
        assert (ROOT / path).is_file(), path


def test_slurm():
    script = (LAUNCH / "slurm.sbatch").read_text()
    shell_parses(script)
    keys_and_files_exist(script)
    found = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.M))
    assert {"nodes", "time", "requeue", "output"} <= found.keys()
    assert found["ntasks-per-node"] == "1" and found["open-mode"] == "append"
    assert re.fullmatch(r"TERM@\d+", found["signal"])  # B: would reach the batch shell alone
    before, _, body = script.partition("set -euo pipefail")
    assert "#SBATCH" not in body, "sbatch stops reading them at the first command"
    assert all(line.startswith("#") for line in before.splitlines())
    assert f"status == {EXIT_RESUME_ME}" in body


def test_kubernetes():
    text = (LAUNCH / "kubernetes.yaml").read_text()
    keys_and_files_exist(text)
    jobset = yaml.safe_load(text)
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(env["JAX_NUM_PROCESSES"])
    name = jobset["metadata"]["name"]
    first = f"{name}-{group['name']}-0-0.{name}:55527"
    assert find(env | {"JOB_COMPLETION_INDEX": "1"}) == Launch("kubernetes", first, 2, 1)
    # Status 75 starts all again, however often; other ends count.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [EXIT_RESUME_ME] and rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (again,) = jobset["spec"]["failurePolicy"]["rules"]
    assert again["onJobFailureReasons"] == ["PodFailurePolicy"] and job["backoffLimit"] == 0
    mounts, volumes = container["volumeMounts"], pod["volumes"]
    assert [m["name"] for m in mounts] == [v["name"] for v in volumes]
    assert env["NANOCHAT_BASE_DIR"] in [m["mountPath"] for m in mounts]


@pytest.mark.parametrize("node", ["0", "1"])
def test_skypilot(node, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    shell_parses(task["setup"])
    keys_and_files_exist(task["setup"] + task["run"])
    assert EXIT_RESUME_ME in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    # Run with a speedrun.sh that only says what it was told.
    (tmp_path / "speedrun.sh").write_text('echo "$NANOCHAT_BASE_DIR" "$@"\n')
    env = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_NUM_NODES": "2"}
    env |= {"SKYPILOT_NODE_RANK": node, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    base_dir, *words = done.stdout.split()
    assert base_dir in task["volumes"]
    _, overrides, rest = cfg.parse_argv(words, None)
    mesh = {key.removeprefix("mesh."): value for key, value in overrides.items()}
    numbers = {key: int(mesh[key]) for key in ("num_processes", "process_id")}
    found = find({}, coordinator=mesh["coordinator"], **numbers)
    assert found == Launch("flags", "10.0.0.7:55527", task["num_nodes"], int(node)) and not rest


def test_dockerfile():
    text = (LAUNCH / "Dockerfile").read_text()
    steps = [line.split()[0] for line in text.splitlines() if line and line[0].isupper()]
    assert steps == ["FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENV", "CMD"]
    base = re.search(r"^FROM python:3\.(\d+)-slim$", text, re.M)
    assert base and int(base[1]) >= 11
    assert "-c constraints/constraints.txt" in text and '".[gpu,demo]"' in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv"} <= set(ignored)

"""The files of launch/: what they promise fits what the code does."""

import re
import subprocess

import pytest
import yaml

from nanochat_jax import config as cfg
from nanochat_jax.common import EXIT_RESUME_ME
from nanochat_jax.launch.cluster import Launch, find

ROOT = cfg.CONFIGS.parent
LAUNCH = ROOT / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_keys_files_and_exit_status_exist(path):
    text = path.read_text()
    known = cfg.flatten(cfg.load(cfg.CONFIGS / "default.py"))
    assert set(re.findall(r"--config\.(\w+\.\w+)", text)) <= known.keys()
    for file in re.findall(r"(?:^|[ =])((?:scripts|configs|launch)/[\w./]+|speedrun\.sh)", text):
        assert (ROOT / file).is_file(), file
    if path.name != "Dockerfile":
        assert re.search(rf"\b{EXIT_RESUME_ME}\b", text)


def test_kubernetes_starts_the_processes_that_we_find():
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    (group,) = jobset["spec"]["replicatedJobs"]
    job, name = group["template"]["spec"], jobset["metadata"]["name"]
    (container,) = job["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(env["JAX_NUM_PROCESSES"])
    first = f"{name}-{group['name']}-0-0.{name}:55527"
    assert find(env | {"JOB_COMPLETION_INDEX": "1"}) == Launch("kubernetes", first, 2, 1)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [EXIT_RESUME_ME]


@pytest.mark.parametrize("node", ["0", "1"])
def test_skypilot_starts_the_processes_that_we_find(node, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (tmp_path / "speedrun.sh").write_text('echo "$@"\n')  # one that says what it was told
    env = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_NUM_NODES": "2"}
    env |= {"SKYPILOT_NODE_RANK": node, "PATH": "/usr/bin:/bin"}
    said = subprocess.check_output(["bash", "-c", task["run"]], cwd=tmp_path, env=env, text=True)
    _, overrides, rest = cfg.parse_argv(said.split(), None)
    numbers = {key: int(overrides[f"mesh.{key}"]) for key in ("num_processes", "process_id")}
    found = find({}, coordinator=overrides["mesh.coordinator"], **numbers)
    assert found == Launch("flags", "10.0.0.7:55527", task["num_nodes"], int(node)) and not rest

"""Several processes: found as their launchers say, training as one, and ending together."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jax._src.clusters import SlurmCluster

from nanochat_jax import config as cfg
from nanochat_jax.common import EXIT_RESUME_ME, UserError
from nanochat_jax.launch import cluster
from nanochat_jax.launch.cluster import Launch, find
from nanochat_jax.train.metrics import read_metrics

ROOT = cfg.CONFIGS.parent
KEYS = {
    "data.name": "local",
    "data.buffer_docs": 16,
    "data.num_lanes": 4,
    "tokenizer.vocab_size": 280,
    "model.seq_len": 32,
    "base.num_steps": 40,  # long enough to be interrupted: JAX looks for SIGTERM once a second
    "base.total_batch_tokens": 512,
    "base.device_batch_size": 2,
    "base.eval_every": 20,
    "base.save_every": 8,
    "eval.val_tokens": 512,
    "eval.device_batch_size": 1,
    "eval.prompts": '("the cat",)',
    "eval.sample_tokens": 2,
}

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "16",
}
OPENMPI = {"SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
OPENMPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in OPENMPI.items()}
POD = "run-workers-0-0.run:55527"
KUBERNETES = {"JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}
KUBERNETES["JAX_COORDINATOR_ADDRESS"] = POD
FLAGS = {"coordinator": "h:1", "num_processes": 3, "process_id": 2}


@pytest.mark.parametrize(
    "nodes", ["node7", "node7,x2", "gpu[007-008]", "gpu[3,7-9],x2", "a-b12-[01-04]"]
)
def test_slurm_coordinator_is_the_one_jax_finds(nodes, monkeypatch):
    env = SLURM | {"SLURM_STEP_NODELIST": nodes}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = find(env)
    assert found and found.coordinator == SlurmCluster.get_coordinator_address(None, None)
    assert SlurmCluster.is_env_present() and (found.process_id, found.num_processes) == (11, 16)


def test_who_started_us():
    assert find(SLURM) == Launch("slurm", "gpu007:62016", 16, 11, (3,))
    # One process for all GPUs of a node; GPUs already divided; as the recipe says.
    a_node_each = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert find(a_node_each) == Launch("slurm", "gpu007:62016", 2, 1)
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": "5"}) == Launch("slurm", "gpu007:62016", 16, 11)
    found = find(SLURM, coordinator="ib0:99", local_device_ids="6,7")
    assert found == Launch("slurm", "ib0:99", 16, 11, (6, 7))
    assert find(OPENMPI) == Launch("openmpi", "127.0.0.1:55527", 2, 1, (1,))
    assert find(KUBERNETES) == Launch("kubernetes", POD, 4, 2)
    assert find(SLURM, **FLAGS) == Launch("flags", "h:1", 3, 2)
    assert find({}) is None
    assert find(SLURM, launcher="none") is None
    assert find(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None  # in a shell of a job of many tasks
    assert find({"JOB_COMPLETION_INDEX": "5"}) is None  # one of many runs, not part of one


@pytest.mark.parametrize(
    "env, keys, named",
    [
        ({}, {"launcher": "slurp"}, "config.mesh.launcher got 'slurp'"),
        ({}, {"launcher": "slurm"}, "SLURM_STEP_NUM_TASKS"),
        ({}, {"num_processes": 2}, "coordinator ''"),
        ({}, FLAGS | {"process_id": 3}, "process 3 of 3"),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {}, "openmpi got coordinator ''"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8(x2)"}, {}, "SLURM_STEP_NUM_TASKS got '8"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {}, "JAX_NUM_PROCESSES"),
        (SLURM, {"local_device_ids": "one"}, "config.mesh.local_device_ids got 'one'"),
    ],
)
def test_what_cannot_be_is_refused(env, keys, named):
    with pytest.raises(UserError, match=named):
        find(env, **keys)


def test_strangers_do_not_join():
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    knocks = [b"GET / HTTP/1.1\r\n", cluster.HELLO.pack(8, 1), cluster.HELLO.pack(7, 2), b"short"]
    lines = [socket.create_connection(address) for _ in (*knocks, 0)]
    for line, hello in zip(lines, (*knocks, cluster.HELLO.pack(7, 1)), strict=True):
        line.sendall(hello)
    lines[3].shutdown(socket.SHUT_WR)
    joined = cluster._accept(server, 7, {1})
    assert [*joined.values()] == [1]
    assert [*joined][0].getpeername() == lines[4].getsockname()
    for line in (*lines, *joined):
        line.close()


def test_the_leaving_are_not_missed(capsys):
    """A connection that closes while its process leaves ends nothing."""
    ours, theirs = socket.socketpair()
    leaving = threading.Event()
    leaving.set()
    theirs.close()
    cluster._wait_for_an_end({ours: 0}, leaving, Launch("flags", "h:1", 2, 1))
    ours.close()
    assert capsys.readouterr().err == ""


# From here on: whole runs on a tiny recipe, processes of two devices each.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all runs of this file are written, with a folder of texts to learn from."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "text").mkdir()
    rng = random.Random(0)
    for number in range(200):
        words = (rng.choice(["the cat", "a dog", "sees", "a boat", "rain"]) for _ in range(60))
        (folder / "text" / f"{number:03d}.txt").write_text(" ".join(words))
    return folder


class Group:
    """scripts/train.py in some processes that find one another by flags; outputs in files."""

    def __init__(
        self, folder: Path, name: str, size: int, devices: int = 2, extra: str = "", **env
    ):
        """extra, env: an argument and variables for the last process."""
        self.folder, self.name = folder, name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        keys = KEYS | {
            "run.name": name,
            "data.local_dir": folder / "text",
            "mesh.coordinator": f"127.0.0.1:{port}",
            "mesh.num_processes": size,
        }
        words = [sys.executable, "scripts/train.py", "--config=configs/tiny.py"]
        words += [f"--config.{key}={value}" for key, value in keys.items()]
        flags = (
            f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
        )
        base = {"PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(folder), "XLA_FLAGS": flags}
        self.processes, self.outputs = [], []
        for process in range(size):
            own = [f"--config.mesh.process_id={process}"]
            variables = os.environ | base
            if process == size - 1:
                own += [extra] if extra else []
                variables |= env
            self.outputs.append(folder / f"{name}.{process}.{time.time_ns()}.log")
            with open(self.outputs[-1], "w") as file:
                streams = {"stdout": file, "stderr": file}
                self.processes.append(
                    subprocess.Popen(words + own, cwd=ROOT, env=variables, **streams)
                )

    def lines(self) -> list[dict]:
        return read_metrics(self.folder / "runs" / self.name / "base" / "metrics.jsonl")

    def signal_after_step(self, step: int, process: int, number: int) -> None:
        """Send a signal to one process once a line about `step` is there."""
        while not any(line["step"] >= step for line in self.lines()):
            assert all(p.poll() is None for p in self.processes), self.output()
            time.sleep(0.005)
        self.processes[process].send_signal(number)

    def statuses(self, within_secs: float = 200) -> list[int]:
        """Exit statuses of all, who must end within so many seconds."""
        stop = time.monotonic() + within_secs
        try:
            return [p.wait(max(0, stop - time.monotonic())) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def output(self, process: int | None = None) -> str:
        wanted = self.outputs if process is None else [self.outputs[process]]
        return "\n".join(path.read_text() for path in wanted)


@pytest.fixture(scope="module")
def alone(folder) -> list[dict]:
    """The metrics of one process with eight devices, never interrupted."""
    group = Group(folder, "alone", 1, devices=8)
    assert group.statuses() == [0], group.output()
    return group.lines()


def assert_learned_the_same(lines: list[dict], expected: list[dict]) -> None:
    assert [(x["kind"], x["step"]) for x in lines] == [(x["kind"], x["step"]) for x in expected]
    for ours, theirs in zip(lines, expected, strict=True):
        for name in {"loss", "grad_norm", "val_bpb"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (name, ours["step"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_train_as_one(folder, alone, size):
    group = Group(folder, f"together{size}", size)
    assert group.statuses() == [0] * size, group.output()
    assert_learned_the_same(group.lines(), alone)
    assert "loss" in group.output(0) and "loss" not in group.output(1)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_half_of_them_continue(folder, alone):
    group = Group(folder, "killed", 4)
    group.signal_after_step(12, 2, signal.SIGKILL)
    assert group.statuses(within_secs=60) == [1, 1, -signal.SIGKILL, 1], group.output()
    errors = [line for line in group.output(0).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "process 2 of 4 is gone" in errors[0]
    assert "Traceback" not in group.output() and "stack trace" not in group.output()

    group = Group(folder, "killed", 2)
    assert group.statuses() == [0, 0], group.output()
    assert "continuing from the checkpoint at step" in group.output(0)
    assert_learned_the_same(group.lines(), alone)


@pytest.mark.long
def test_a_signal_to_one_process_saves_all(folder, alone):
    for step, process, number in ((2, 1, signal.SIGINT), (20, 0, signal.SIGTERM)):
        group = Group(folder, "stopped", 2)
        group.signal_after_step(step, process, number)
        assert group.statuses(within_secs=60) == [EXIT_RESUME_ME] * 2, group.output()
        assert "saved; run the same command to continue" in group.output(0)
    group = Group(folder, "stopped", 1)
    assert group.statuses() == [0], group.output()
    assert_learned_the_same(group.lines(), alone)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(folder):
    group = Group(folder, "wrong", 2, extra="--config.data.num_lanes=3")
    assert group.statuses() == [1, 1]
    assert "error: " in group.output(1) and "config.data.num_lanes" in group.output(1)
    assert "process 1 of 2 is gone" in group.output(0)


@pytest.mark.long
def test_processes_must_share_their_folder(folder, tmp_path):
    group = Group(folder, "apart", 2, NANOCHAT_BASE_DIR=str(tmp_path))
    assert group.statuses() == [1, 1]
    assert f"NANOCHAT_BASE_DIR got {tmp_path}" in group.output(1)
    assert "process 1 of 2 is gone" in group.output(0)

"""speedrun.sh and scripts/env.sh, run for real with stand-ins for Python, uv and nvidia-smi.

The two scripts are copied to a folder with a space in its name, and PATH holds nothing but the
small tools they use and our stand-ins: neither GPUs, Pythons nor network of this machine matter.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = (
    "data.py tok_train.py tok_eval.py train.py base_eval.py mid_train.py chat_eval.py chat_sft.py "
    "chat_eval.py chat_rl.py chat_eval.py report.py"
).split()
TOOLS = (
    "awk basename bash cat chmod cksum cut dirname flock grep mkdir rm sed sh sleep sort tail tr"
).split()

PYTHON = """#!/bin/sh
case "$1 $2" in
  *version_info*) echo 3.12.1; exit ;;
  -c*) echo "$RESULTS"; exit ;;
esac
echo "$(basename "$1") $*" >>"$CALLS"
case "$(basename "$1")" in
  "$FAILING_STAGE") exit "$FAILING_STATUS" ;;
  "$WAITING_STAGE")
    trap 'sleep 0.2; exit 75' TERM INT
    echo waiting
    sleep 20 >/dev/null 2>&1 &
    wait $! ;;
esac
"""

UV = """#!/bin/sh
echo "uv $*" >>"$CALLS"
if [ "$1" = venv ]; then
  for folder; do :; done
  mkdir -p "$folder/bin"
  cat "$STUB_PYTHON" >"$folder/bin/python"
  chmod +x "$folder/bin/python"
elif [ -n "$UV_FAILS" ]; then
  echo "$UV_FAILS"; exit 2
fi
"""


class Sandbox:
    def __init__(self, folder: Path):
        self.root = folder / "a clone"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.bin.mkdir()
        for tool in TOOLS:
            if path := shutil.which(tool):  # flock is optional
                (self.bin / tool).symlink_to(path)
        for name in ("speedrun.sh", "scripts/env.sh", "pyproject.toml", "constraints", "configs"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, self.root / name)
        for recipe in ("demo.py", "d20.py", "tiny.py"):
            (self.root / "configs" / recipe).touch()
        self.python = self.script("a python", PYTHON)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "CALLS": str(self.calls_file),
            "RESULTS": "/results/here",
            "STUB_PYTHON": str(self.python),
            "NANOCHAT_PYTHON": str(self.python),
        }

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(self.root / "speedrun.sh"), *args]
        return subprocess.run(
            command, env=self.env | env, cwd=self.bin, capture_output=True, text=True, timeout=60
        )

    def ensure_env(self, *extras: str, **env: str) -> subprocess.CompletedProcess:
        code = 'set -euo pipefail; . "$1/scripts/env.sh"; shift; ensure_env "$@"; echo "PY=$PY"'
        env = {k: v for k, v in (self.env | env).items() if k != "NANOCHAT_PYTHON"}
        command = ["bash", "-c", code, "-", str(self.root), *extras]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        """What was called since the last time we asked."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.write_text("")
        return lines

    def stages(self) -> list[str]:
        return [line.split()[0] for line in self.calls()]


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.mark.parametrize(
    ("gpus", "env", "recipe", "reason"),
    [
        (0, {}, "demo", ""),
        (8, {}, "d20", ""),
        (3, {}, "d20", "2.67 times"),
        (8, {"CUDA_VISIBLE_DEVICES": "0,1"}, "d20", "4 times"),
        (8, {"CUDA_VISIBLE_DEVICES": ""}, "demo", ""),
        (8, {"JAX_PLATFORMS": "cpu"}, "demo", ""),
        (8, {"CONFIG": "configs/tiny.py"}, "tiny", ""),
    ],
)
def test_recipe_follows_gpus(sandbox, gpus, env, recipe, reason):
    lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(gpus))
    sandbox.script("nvidia-smi", f"#!/bin/sh\n{lines or 'echo it has failed; exit 9'}\n")
    done = sandbox.run(FAILING_STAGE="data.py", FAILING_STATUS="3", **env)
    assert f"recipe: configs/{recipe}.py, " in done.stdout and reason in done.stdout
    assert sandbox.calls()[0].endswith(f" --config={sandbox.root}/configs/{recipe}.py")


def test_every_stage_gets_the_same_recipe_and_overrides(sandbox):
    words = ["--config", "configs/tiny.py", "--config.run.name=a b", "--config.base.num_steps", "5"]
    done = sandbox.run(*words)
    given = ["configs/tiny.py", "--config.run.name=a b", "--config.base.num_steps=5"]
    given[0] = f"--config={sandbox.root}/{given[0]}"
    calls = sandbox.calls()
    assert all(call.endswith(" ".join(given)) for call in calls)
    assert [call.split()[0] for call in calls] == STAGES
    assert all((ROOT / "scripts" / name).is_file() for name in STAGES)
    assert re.findall(r"chat_stage=(\w+)", " ".join(calls)) == ["mid", "sft", "rl"]
    talk = shlex.split(done.stdout.splitlines()[-1])  # the command to talk to the model
    assert talk[-4:] == [f"{sandbox.root}/scripts/chat_cli.py", *given]


@pytest.mark.parametrize(("status", "script"), [(75, "train.py"), (3, "tok_train.py")])
def test_a_stage_that_stops_ends_all_with_its_status(sandbox, status, script):
    done = sandbox.run(FAILING_STAGE=script, FAILING_STATUS=str(status))
    assert done.returncode == status and "run the same command again" in done.stderr
    assert sandbox.stages() == STAGES[: STAGES.index(script) + 1]


# Started in the background or under nohup, a program ignores these signals; ours starts as if not.
LISTENING = """
import os, signal, sys
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(name, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_reaches_the_stage_and_its_status_is_kept(sandbox, sent):
    command = [str(sandbox.bin / "bash"), str(sandbox.root / "speedrun.sh")]
    with subprocess.Popen(
        [sys.executable, "-I", "-c", LISTENING, *command],
        env=sandbox.env | {"WAITING_STAGE": "train.py"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        while process.stdout.readline() != "waiting\n":
            assert process.poll() is None
        process.send_signal(sent)
        assert process.wait(timeout=20) == 75
    assert sandbox.stages() == STAGES[:4]


@pytest.mark.parametrize("words", [["--depth=4"], ["--config=configs/no.py"], ["--config"]])
def test_wrong_command_line_is_one_line_and_starts_nothing(sandbox, words):
    done = sandbox.run(*words)
    assert (done.returncode, sandbox.calls()) == (1, [])
    assert words[0].removeprefix("--config=") in done.stderr and done.stderr.count("\n") == 1


def test_environment_is_made_once_and_again_only_when_stale(sandbox):
    sandbox.script("uv", UV)
    venv = sandbox.root / ".venv"

    def made(*extras: str, **env: str) -> list[str]:
        """What was called for these extras: venv, or an installation's extras."""
        assert sandbox.ensure_env(*extras, **env).returncode == int("UV_FAILS" in env)
        return ["venv" if " venv " in call else call.split(" -e ")[1] for call in sandbox.calls()]

    assert made("demo", UV_FAILS="killed") == ["venv", ".[demo]"]
    assert made("demo") == ["venv", ".[demo]"]
    assert made("demo") == []
    assert made("dev", "demo") == [".[demo,dev]"]
    assert made("demo") == []  # what dev brought stays
    with open(sandbox.root / "constraints" / "constraints.txt", "a") as file:
        file.write("# newer\n")
    assert made("demo") == [".[demo,dev]"]
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    assert made("demo") == ["venv", ".[demo,dev]"]
    sandbox.root = sandbox.root.rename(sandbox.root.with_name("moved"))
    assert made("demo") == ["venv", ".[demo,dev]"]


@pytest.mark.parametrize(
    ("env", "python", "named"),
    [
        ({}, "", "uv"),
        ({}, "echo 3.9.18", "python3"),
        ({"PYTHON": "python3"}, "echo 3.9.18", "PYTHON="),
    ],
)
def test_a_missing_python_is_told_in_one_line(sandbox, env, python, named):
    sandbox.script("python3", f"#!/bin/sh\n{python or 'exit 127'}\n")
    done = sandbox.ensure_env("demo", **env)
    assert done.returncode == 1 and named in done.stderr and done.stderr.count("\n") == 1

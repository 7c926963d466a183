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
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = (
    "data.py tok_train.py tok_eval.py train.py base_eval.py mid_train.py chat_eval.py chat_sft.py "
    "chat_eval.py chat_rl.py chat_eval.py report.py"
).split()
TOOLS = (
    "awk basename bash cat chmod cksum cut dirname flock grep mkdir rm sed sh sleep sort tail tr"
)

PYTHON = """#!/bin/sh
case "$1 $2" in *version_info*) echo 3.12.1; exit ;; esac
echo "$(basename "$1") $*" >>"$CALLS"
if [ "$(basename "$1")" = "$STOPS" ]; then eval "$HOW"; fi
"""
WAITS = "trap 'sleep 0.2; exit 75' TERM INT; echo waiting; sleep 20 >/dev/null 2>&1 & wait $!"

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


class Clone:
    def __init__(self, folder: Path):
        self.root, self.bin, self.calls_file = folder / "a clone", folder / "bin", folder / "calls"
        self.bin.mkdir()
        for tool in TOOLS.split():
            if path := shutil.which(tool):  # flock is optional
                (self.bin / tool).symlink_to(path)
        for name in ("speedrun.sh", "scripts/env.sh", "pyproject.toml", "constraints", "configs"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, self.root / name)
        self.env = {"PATH": str(self.bin), "HOME": str(folder), "CALLS": str(self.calls_file)}
        self.env["STUB_PYTHON"] = str(self.script("a python", PYTHON))

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def bash(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        options = {"cwd": self.bin, "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run(["bash", *words], env=self.env | env, **options)

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        env["NANOCHAT_PYTHON"] = self.env["STUB_PYTHON"]
        return self.bash(f"{self.root}/speedrun.sh", *words, **env)

    def ensure_env(self, *extras: str, **env: str) -> subprocess.CompletedProcess:
        code = 'set -euo pipefail; . "$1"; shift; ensure_env "$@"'
        return self.bash("-c", code, "-", f"{self.root}/scripts/env.sh", *extras, **env)

    def calls(self) -> list[str]:
        """What was called since the last time we asked, without the page that comes and goes."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.write_text("")
        return [line for line in lines if "--serve" not in line]


def stages(calls: list[str]) -> list[str]:
    return [call.split()[0] for call in calls]


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


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
def test_recipe_follows_gpus(clone, gpus, env, recipe, reason):
    lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(gpus))
    clone.script("nvidia-smi", f"#!/bin/sh\n{lines or 'echo it has failed; exit 9'}\n")
    done = clone.run(STOPS="data.py", HOW="exit 3", **env)
    assert f"recipe: configs/{recipe}.py, " in done.stdout and reason in done.stdout
    assert clone.calls()[0].endswith(f" --config={clone.root}/configs/{recipe}.py")


def test_every_stage_gets_the_same_recipe_and_overrides(clone):
    words = ["--config", "configs/tiny.py", "--config.run.name=a b", "--config.base.num_steps", "5"]
    done, calls = clone.run(*words, NANOCHAT_BASE_DIR="/a b"), clone.calls()
    given = ["configs/tiny.py", "--config.run.name=a b", "--config.base.num_steps=5"]
    given[0] = f"--config={clone.root}/{given[0]}"
    assert all(call.endswith(" ".join(given)) for call in calls)
    assert stages(calls) == STAGES
    assert all((ROOT / "scripts" / name).is_file() for name in STAGES)
    assert re.findall(r"chat_stage=(\w+)", " ".join(calls)) == ["mid", "sft", "rl"]
    for name, line in zip(
        ("chat_web.py", "chat_cli.py"), done.stdout.splitlines()[-2:], strict=True
    ):
        assert shlex.split(line)[-4:] == [f"{clone.root}/scripts/{name}", *given]
        assert shlex.split(line)[0] == "NANOCHAT_BASE_DIR=/a b"


@pytest.mark.parametrize(("status", "script"), [(75, "train.py"), (3, "tok_train.py")])
def test_a_stage_that_stops_ends_all_with_its_status(clone, status, script):
    done = clone.run(STOPS=script, HOW=f"exit {status}")
    assert done.returncode == status and done.stderr.count("\n") == 1
    assert stages(clone.calls()) == STAGES[: STAGES.index(script) + 1]


# Started in the background or under nohup, a program ignores these signals; ours starts as if not.
LISTENING = """
import os, signal, sys
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(name, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_reaches_the_stage_and_its_status_is_kept(clone, sent):
    command = [sys.executable, "-I", "-c", LISTENING, clone.bin / "bash"]
    command += [clone.root / "speedrun.sh"]
    env = {"STOPS": "train.py", "HOW": WAITS, "NANOCHAT_PYTHON": clone.env["STUB_PYTHON"]}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=clone.env | env, **pipes) as process:
        assert process.stdout
        while process.stdout.readline() != "waiting\n":
            assert process.poll() is None
        process.send_signal(sent)
        assert process.wait(timeout=20) == 75
    assert stages(clone.calls()) == STAGES[:4]


PAGE = """#!/bin/sh
case "$1 $2" in *version_info*) echo 3.12.1; exit ;; esac
case "$*" in
  *--serve*)
    echo "$*" >>"$CALLS"
    trap 'echo ended >>"$CALLS"; exit 9' TERM
    sleep 9 >/dev/null 2>&1 & wait $! ;;
  *data.py*) for i in 1 2 3 4 5 6 7 8 9; do grep -qs serve "$CALLS" || sleep 0.2; done ;;
  *train.py*) exit 75 ;;
esac
"""


def test_the_page_about_the_run_ends_with_it_and_leaves_its_status_alone(clone):
    clone.script("a python", PAGE)
    assert clone.run("--config=configs/tiny.py").returncode == 75
    for _ in range(100):  # what is asked to end may take a moment
        lines = clone.calls_file.read_text().splitlines()
        if "ended" in lines:
            break
        time.sleep(0.1)
    assert re.fullmatch(r".*report.py --serve --port=0 --until=\d+ --config=.*/tiny.py", lines[0])
    assert lines[1:] == ["ended"]


def test_of_several_processes_one_shows_the_page(clone):
    clone.script("a python", PAGE)
    for rank, shown in (("10", False), ("0", True)):
        assert clone.run("--config=configs/tiny.py", SLURM_PROCID=rank).returncode == 75
        assert clone.calls_file.exists() == shown


@pytest.mark.parametrize("words", [["--depth=4"], ["--config=configs/no.py"], ["--config"]])
def test_wrong_command_line_is_one_line_and_starts_nothing(clone, words):
    done = clone.run(*words)
    assert (done.returncode, clone.calls()) == (1, [])
    assert words[0].removeprefix("--config=") in done.stderr and done.stderr.count("\n") == 1


def test_environment_is_made_once_and_again_only_when_stale(clone):
    clone.script("uv", UV)

    def made(*extras: str, **env: str) -> list[str]:
        """What was called for these extras: venv, or an installation's extras."""
        assert clone.ensure_env(*extras, **env).returncode == int("UV_FAILS" in env)
        return ["venv" if " venv " in call else call.split(" -e ")[1] for call in clone.calls()]

    assert made("demo", UV_FAILS="killed") == ["venv", ".[demo]"]
    assert made("demo") == ["venv", ".[demo]"]
    assert made("demo") == []
    assert made("dev", "demo") == [".[demo,dev]"]
    assert made("demo") == []  # what dev brought stays
    with open(clone.root / "constraints" / "constraints.txt", "a") as file:
        file.write("# newer\n")
    assert made("demo") == [".[demo,dev]"]
    (clone.root / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    assert made("demo") == ["venv", ".[demo,dev]"]
    clone.root = clone.root.rename(clone.root.with_name("moved"))
    assert made("demo") == ["venv", ".[demo,dev]"]


@pytest.mark.parametrize(
    "env, python", [({}, "exit 127"), ({}, "echo 3.9.18"), ({"PYTHON": "python3"}, "echo 3.9.18")]
)
def test_a_missing_python_is_told_in_one_line(clone, env, python):
    clone.script("python3", f"#!/bin/sh\n{python}\n")
    done = clone.ensure_env("demo", **env)
    assert done.returncode == 1 and re.fullmatch(".*python3.*PYTHON=.*uv\n", done.stderr)

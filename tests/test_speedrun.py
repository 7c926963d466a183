"""speedrun.sh and scripts/env.sh, run for real with stand-ins for Python, uv and nvidia-smi.

The two scripts are copied to a folder with a space in its name, and PATH holds nothing but the
small tools they use and our stand-ins: neither GPUs, Pythons nor network of this machine matter.
"""

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

    def gpus(self, count: int) -> None:
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(count))
        self.script("nvidia-smi", f"#!/bin/sh\n{lines}")

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


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.mark.parametrize(
    ("gpus", "env", "recipe", "reason"),
    [
        (0, {}, "demo", "no NVIDIA GPU"),
        (8, {}, "d20", "found 8 NVIDIA GPUs\n"),
        (16, {}, "d20", "found 16 NVIDIA GPUs\n"),
        (1, {}, "d20", "found 1 NVIDIA GPU; it is made for 8, so this takes 8 times as long"),
        (3, {}, "d20", "takes 2.67 times as long"),
        (8, {"CUDA_VISIBLE_DEVICES": "0,1"}, "d20", "takes 4 times as long"),
        (8, {"CUDA_VISIBLE_DEVICES": ""}, "demo", "no NVIDIA GPU"),
        (8, {"JAX_PLATFORMS": "cpu"}, "demo", "no NVIDIA GPU"),
        (8, {"CONFIG": "configs/tiny.py"}, "tiny", "as you asked"),
    ],
)
def test_recipe_follows_gpus(sandbox, gpus, env, recipe, reason):
    if gpus:
        sandbox.gpus(gpus)
    done = sandbox.run(**env)
    assert done.returncode == 0, done.stderr
    assert f"recipe: configs/{recipe}.py, " in done.stdout and reason in done.stdout
    given = f"--config={sandbox.root}/configs/{recipe}.py"
    called = [line.split(" ", 1) for line in sandbox.calls()]
    assert [name for name, _ in called] == STAGES
    assert all(rest.endswith(given) for _, rest in called)


def test_every_stage_exists():
    assert [name for name in STAGES if not (ROOT / "scripts" / name).is_file()] == []


def test_driver_that_does_not_answer_counts_as_no_gpu(sandbox):
    sandbox.script("nvidia-smi", "#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert "recipe: configs/demo.py" in sandbox.run().stdout


def test_every_stage_gets_the_same_recipe_and_overrides(sandbox):
    words = ["--config", "configs/tiny.py", "--config.run.name=a b", "--config.base.num_steps", "5"]
    done = sandbox.run(*words, CONFIG="configs/d20.py")
    assert done.returncode == 0, done.stderr
    scripts, tail = sandbox.root / "scripts", "--config.run.name=a b --config.base.num_steps=5"
    recipe = f"--config={sandbox.root}/configs/tiny.py"
    own = {"data.py": iter(["ensure "])}
    own["chat_eval.py"] = (f"--config.eval.chat_stage={stage} " for stage in ("mid", "sft", "rl"))
    assert sandbox.calls() == [
        f"{name} {scripts}/{name} {next(own.get(name, iter(())), '')}{recipe} {tail}"
        for name in STAGES
    ]
    words_of_all = ["--config.run.name=a b", "--config.base.num_steps=5"]
    report, talk = done.stdout.splitlines()[-2:]
    assert "/results/here/report/report.md" in report
    assert shlex.split(talk)[-4:] == [f"{scripts}/chat_cli.py", recipe, *words_of_all]


def test_recipe_beside_the_user_comes_first(sandbox):
    (sandbox.bin / "mine.py").touch()
    assert sandbox.run("--config=mine.py").returncode == 0
    assert sandbox.calls()[0].endswith("ensure --config=mine.py")


def test_interrupted_stage_stops_with_the_way_to_continue(sandbox):
    done = sandbox.run(FAILING_STAGE="train.py", FAILING_STATUS="75")
    assert done.returncode == 75
    assert "to continue, run the same command again" in done.stderr
    assert [line.split()[0] for line in sandbox.calls()] == STAGES[:4]


def test_failing_stage_stops_with_its_status(sandbox):
    done = sandbox.run(FAILING_STAGE="tok_train.py", FAILING_STATUS="3")
    assert done.returncode == 3
    assert "error: [2/12] train the tokenizer: exit status 3" in done.stderr
    assert [line.split()[0] for line in sandbox.calls()] == STAGES[:2]


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
        assert "run the same command again" in process.stderr.read()
    time.sleep(0.1)
    assert [line.split()[0] for line in sandbox.calls()] == STAGES[:4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depth=4"], "error: unknown argument '--depth=4'; expected --config=FILE or"),
        (["--config=configs/no.py"], "error: no recipe at configs/no.py; there are configs/"),
        (["--config"], "error: --config needs a value"),
    ],
)
def test_wrong_command_line_is_one_line_and_starts_nothing(sandbox, words, message):
    done = sandbox.run(*words)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert sandbox.calls() == []


def test_environment_is_made_once_and_again_only_when_stale(sandbox):
    sandbox.script("uv", UV)
    sandbox.script("python3", PYTHON)
    venv = sandbox.root / ".venv"

    def installed(*extras: str) -> str:
        return (
            f"uv pip install --python {venv}/bin/python --only-binary :all: "
            f"-c constraints/constraints.txt -e .[{','.join(extras)}]"
        )

    make = f"uv venv --quiet --python python3 {venv}"
    first = sandbox.ensure_env("demo")
    assert first.returncode == 0, first.stderr
    assert f"PY={venv}/bin/python" in first.stdout
    assert sandbox.calls() == [make, installed("demo")]

    again = sandbox.ensure_env("demo")
    assert "up to date (Python 3.12.1; extras: demo)" in again.stdout
    assert sandbox.calls() == []

    sandbox.ensure_env("dev", "demo")
    assert sandbox.calls() == [installed("demo", "dev")]
    sandbox.ensure_env("demo")  # what dev brought stays
    assert sandbox.calls() == []

    with open(sandbox.root / "constraints" / "constraints.txt", "a") as file:
        file.write("# newer\n")
    sandbox.ensure_env("demo")
    assert sandbox.calls() == [installed("demo", "dev")]

    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    sandbox.ensure_env("demo")
    assert sandbox.calls() == [make, installed("demo", "dev")]

    moved = sandbox.root.with_name("moved")
    sandbox.root.rename(moved)
    sandbox.root = moved
    sandbox.ensure_env("demo")
    assert [line.split()[1] for line in sandbox.calls()] == ["venv", "pip"]


def test_interrupted_install_is_repeated(sandbox):
    sandbox.script("uv", UV)
    sandbox.script("python3", PYTHON)
    assert sandbox.ensure_env("demo", UV_FAILS="killed").returncode == 1
    sandbox.calls()
    assert sandbox.ensure_env("demo").returncode == 0
    assert [line.split()[1] for line in sandbox.calls()] == ["venv", "pip"]


def old_python(sandbox):
    sandbox.script("python3", "#!/bin/sh\necho 3.9.18\n")


def python_without_venv(sandbox):
    sandbox.script("python3", PYTHON.replace("-c*)", "*ensurepip*) exit 1 ;;\n  -c*)"))


def uv_without_network(sandbox):
    sandbox.script("python3", PYTHON)
    sandbox.script("uv", UV)
    sandbox.env["UV_FAILS"] = "error: dns error: failed to lookup address information"


def uv_without_a_version(sandbox):
    uv_without_network(sandbox)
    sandbox.env["UV_FAILS"] = "no version of jax==9"


def nothing(sandbox):
    pass


@pytest.mark.parametrize(
    ("situation", "message"),
    [
        (nothing, "error: python3 is missing; install Python 3.11 or newer, or uv"),
        (old_python, "error: Python 3.11 or newer is needed, but python3 is 3.9.18; install one"),
        (python_without_venv, "error: python3 has no venv module; install it"),
        (uv_without_network, "error: no network: uv could not reach the package index"),
        (uv_without_a_version, "error: uv could not install the packages (whole log: "),
    ],
)
def test_what_is_missing_is_said_in_one_line(sandbox, situation, message):
    situation(sandbox)
    done = sandbox.ensure_env("demo")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)


def test_python_variable_names_the_interpreter(sandbox):
    old_python(sandbox)
    sandbox.script("uv", UV)
    assert sandbox.ensure_env("demo", PYTHON=str(sandbox.python)).returncode == 0
    assert sandbox.calls()[0] == f"uv venv --quiet --python {sandbox.python} {sandbox.root}/.venv"
    done = sandbox.ensure_env("demo", PYTHON="python3")
    assert done.stderr == "error: PYTHON=python3: python3 is 3.9.18; expected 3.11 or newer\n"


def test_help_is_the_header_of_the_script(sandbox):
    done = sandbox.run("--help")
    assert done.returncode == 0
    assert "bash speedrun.sh --config=configs/d26.py" in done.stdout
    assert done.stdout.startswith("From raw text") and "set -" not in done.stdout

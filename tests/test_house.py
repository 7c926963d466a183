"""The rules of the house that a machine can check: layers, sizes, keys, and what gets committed.

Files are what a commit of the work tree would hold (git's own answer, ignored files left out), so
that nothing can work here and be missing for those who clone.
"""

import ast
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nanochat_jax import config

ROOT = Path(__file__).parents[1]
CODE = ("nanochat_jax", "scripts", "configs")

# A module imports from its own room and from the rooms above it in this list, never from one below;
# those on one line do not import each other.
LAYERS = (
    ("common",),
    ("hardware", "config"),
    ("tools",),
    ("tokenizer",),
    ("data",),
    ("tasks",),
    ("model",),
    ("optim",),
    ("recipe",),
    ("train",),
    ("launch",),
    ("inference",),
    ("eval",),
    ("rl",),
    ("interop", "serve", "report"),
    ("parity",),
    ("plan",),
    ("stages",),
    ("ahead",),
    ("scripts", "configs"),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
# Beyond the order: a model knows nothing of text, training nothing of evaluations, and recipes stop
# where the work begins.
NO_TEXT = {"tools", "tokenizer", "data", "tasks"}
KEPT_OUT = {"model": NO_TEXT, "optim": NO_TEXT, "train": {"eval"}}
KNOW_CONFIG = {
    "config",
    "recipe",
    "inference",
    "parity",
    "plan",
    "stages",
    "ahead",
    "scripts",
    "configs",
}
MAX_LINES, MAX_TOP_FILES, MAX_PATH_LINES = 400, 8, 2_500
MAY_EXECUTE = {"nanochat_jax/tools/sandbox.py", "nanochat_jax/tools/sandbox_child.py"}


@cache
def files() -> tuple[str, ...]:
    """Every file that a commit would hold, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return tuple(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())
    found = (path for top in (*CODE, "tests", "constraints") for path in (ROOT / top).rglob("*"))
    return tuple(str(path.relative_to(ROOT)) for path in found if path.is_file())


def code(*tops: str) -> list[str]:
    return [name for name in files() if name.endswith(".py") and name.split("/")[0] in tops]


@cache
def syntax(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), name)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(module: str) -> str:
    """The name in LAYERS: "data" for nanochat_jax.data.packing, "plan" for nanochat_jax.plan."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0] if top == "nanochat_jax" else top


@cache
def imports(file: str) -> frozenset[tuple[str, str]]:
    """(module, name) of each import; the name is empty for a plain `import module`."""
    found = set()
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {(node.module or "", alias.name) for alias in node.names}
    return frozenset(found)


def imported_rooms(file: str) -> set[str]:
    ours = ((m, n) for m, n in imports(file) if m.split(".")[0] in CODE)
    return {room(f"nanochat_jax.{n}" if m == "nanochat_jax" else m) for m, n in ours} - {""}


def test_imports_run_one_way():
    wrong = []
    for file in code(*CODE):
        own = room(module_name(file))
        for other in imported_rooms(file) - {own}:
            known = other in RANK and own in RANK
            if not known or RANK[other] >= RANK[own] or other in KEPT_OUT.get(own, ()):
                wrong.append(f"{file} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_recipes_stop_at_the_stages():
    wrong = []
    for file in code(*CODE):
        knows = "config" in imported_rooms(file) or ("ml_collections", "ConfigDict") in imports(
            file
        )
        if knows and room(module_name(file)) not in KNOW_CONFIG:
            wrong.append(file)
    assert not wrong, f"only {sorted(KNOW_CONFIG)} may know the ConfigDict: {wrong}"


def num_lines(file: str) -> int:
    return len((ROOT / file).read_text().splitlines())


def test_files_are_short_and_few_lie_at_the_top():
    long = {file: num_lines(file) for file in code(*CODE) if num_lines(file) > MAX_LINES}
    assert not long, f"one idea a file; split: {long}"
    top = [file for file in code("nanochat_jax") if file.count("/") == 1]
    assert len(top) <= MAX_TOP_FILES, top


def test_the_reading_path_is_short():
    """What README's "Reading it" lists before the overview of rooms."""
    path = (ROOT / "README.md").read_text().split("## Reading it")[1].split("    common")[0]
    named = [word.strip("`.,;()") for word in path.split() if word.startswith(("`", "(`"))]
    known = [name for name in named if name in files() or f"nanochat_jax/{name}" in files()]
    lines = {n: num_lines(n if n in files() else f"nanochat_jax/{n}") for n in known}
    assert len(lines) > 8 and sum(lines.values()) <= MAX_PATH_LINES, lines


def test_every_key_is_read():
    """As an attribute, or by its name where a key is chosen while running."""
    read = set()
    for file in code("nanochat_jax", "scripts"):
        for node in ast.walk(syntax(file)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Constant):
                read.add(node.value)
    keys = config.flatten(config.load(config.CONFIGS / "default.py"))
    unread = [key for key in keys if key.split(".")[1] not in read]
    assert not unread, f"configs/default.py has keys that nothing reads: {unread}"


def test_nothing_of_ours_is_ignored():
    """A bare `data/` in .gitignore would leave nanochat_jax/data out of every clone."""
    here = [
        path.relative_to(ROOT).as_posix()
        for top in (*CODE, "tests", "constraints")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
    ]
    assert not set(here) - set(files())


@pytest.mark.slow
def test_a_clean_copy_imports(tmp_path):
    for file in files():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    modules = [module_name(file) for file in code("nanochat_jax")]
    program = f"import importlib, nanochat_jax\nfor m in {modules}: importlib.import_module(m)\n"
    program += "print(nanochat_jax.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "nanochat_jax" / "__init__.py")


def test_nothing_unpickles_or_evaluates_text():
    wrong = []
    for file in set(code(*CODE)) - MAY_EXECUTE:
        for node in ast.walk(syntax(file)):
            match node:
                case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                    wrong.append(f"{file}:{node.lineno}: {name}()")
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    wrong.append(f"{file}:{node.lineno}: allow_pickle")
        picklers = {"pickle", "dill", "marshal", "shelve"}
        wrong += [f"{file}: {m}" for m, _ in imports(file) if m.split(".")[0] in picklers]
    assert not wrong, "\n".join(wrong)


def test_no_broad_exception_is_swallowed():
    wrong = []
    for file in code(*CODE):
        for node in ast.walk(syntax(file)):
            if isinstance(node, ast.ExceptHandler):
                kind = ast.unparse(node.type) if node.type else "BaseException"
                idle = all(isinstance(step, ast.Pass | ast.Continue) for step in node.body)
                if kind in ("Exception", "BaseException") and idle:
                    wrong.append(f"{file}:{node.lineno}")
    assert not wrong, f"catch what you expect, or say what happened: {wrong}"


def test_no_package_index_is_named():
    """Which index packages come from is the user's business; a lock file of uv names one."""
    hosts = ["py" + "pi.org", "python" + "hosted.org", "npm" + "js.org", "npm" + "js.com"]
    hosts += ["--index" + "-url", "--extra-index" + "-url", "--find" + "-links"]
    texts = (".py", ".sh", ".toml", ".txt", ".md", ".yaml", ".yml", ".cfg", ".html", ".ini", "run")
    found = [
        f"{file}: {host}"
        for file in files()
        if file.endswith(texts)
        for host in hosts
        if host in (ROOT / file).read_text()
    ]
    assert not found
    assert not [file for file in files() if Path(file).name in ("uv.lock", "poetry.lock")]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_constraints_pin_every_dependency(version):
    """Exactly one version for each Python, no options, and nothing that is not pinned."""
    lines = (ROOT / "constraints" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    where = {"python_version": version, "python_full_version": f"{version}.0"}
    where |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    chosen = [pin for pin in pins if not pin.marker or pin.marker.evaluate(where)]
    names = [pin.name for pin in chosen]
    assert len(names) == len(set(names)), "two versions of one package"
    assert all(str(pin.specifier).startswith("==") for pin in chosen)
    assert {"jax", "jaxlib", "flax", "optax", "grain", "jax-cuda12-plugin"} <= set(names)

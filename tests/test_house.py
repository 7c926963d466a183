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

ROOT = Path(__file__).parents[1]
CODE = ("nanochat_jax", "scripts", "configs")

# A module imports from its own layer's package and from the layers above it in this list, never
# from one below; those on one line do not import each other.
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
    ("interop",),
    ("serve", "report", "parity", "bench"),
    ("plan",),
    ("stages",),
    ("scripts", "configs"),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
# Beyond the order: a model knows nothing of text, and recipes stop where the work begins.
NO_TEXT = {"tools", "tokenizer", "data", "tasks"}
KEPT_OUT = {"model": NO_TEXT, "optim": NO_TEXT}
KNOW_CONFIG = {
    "config",
    "recipe",
    "serve",
    "inference",
    "parity",
    "stages",
    "plan",
    "scripts",
    "configs",
}
TRAINING = {"base", "mid", "sft", "rl"}

MAX_LINES = 450
MAX_SCRIPT_LINES = 85
LONG_SCRIPTS = ("bench_", "gpu_check", "parity")  # they are the program, not the door to it
MAY_EXECUTE = {"nanochat_jax/tools/sandbox.py"}  # runs generated code, in a process of its own


@cache
def files() -> tuple[str, ...]:
    """Every file that a commit would hold, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return tuple(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())
    tops = (*CODE, "tests", "constraints")  # no checkout: everything there is
    found = (path for top in tops for path in (ROOT / top).rglob("*"))
    return tuple(str(path.relative_to(ROOT)) for path in found if path.is_file())


def code(*tops: str) -> list[str]:
    return [name for name in files() if name.endswith(".py") and name.split("/")[0] in tops]


@cache
def syntax(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), name)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def unit(module: str) -> str:
    """The name in LAYERS: "data" for nanochat_jax.data.packing, "report" for ...report_read."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0].split("_")[0] if top == "nanochat_jax" else top


def imports(file: str) -> set[tuple[str, str]]:
    """(module, name) of each import; the name is empty for a plain `import module`."""
    found = set()
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def imported_units(file: str) -> set[str]:
    found = set()
    for module, name in imports(file):
        if module.split(".")[0] in CODE:
            found.add(unit(f"nanochat_jax.{name}" if module == "nanochat_jax" else module))
    return found - {""}


def test_imports_run_one_way():
    wrong = []
    for file in code(*CODE):
        own = unit(module_name(file))
        if not own:
            continue  # nanochat_jax/__init__.py
        assert own in RANK, f"{file}: give {own} a place in LAYERS"
        for other in imported_units(file) - {own}:
            assert other in RANK, f"{file} imports {other}"
            if RANK[other] >= RANK[own] or other in KEPT_OUT.get(own, ()):
                wrong.append(f"{file} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_recipes_stop_at_the_stages():
    wrong = []
    for file in code(*CODE):
        found = imports(file)
        knows = "config" in imported_units(file) or ("ml_collections", "ConfigDict") in found
        if knows and unit(module_name(file)) not in KNOW_CONFIG:
            wrong.append(file)
    assert not wrong, f"only {sorted(KNOW_CONFIG)} may know the ConfigDict: {wrong}"


def test_files_are_short():
    def limit(file: str) -> int:
        top, _, name = file.rpartition("/")
        door = top == "scripts" and not name.startswith(LONG_SCRIPTS)
        return MAX_SCRIPT_LINES if door else MAX_LINES

    long = {file: len((ROOT / file).read_text().splitlines()) for file in code(*CODE)}
    long = {file: count for file, count in long.items() if count > limit(file)}
    assert not long, f"one idea a file; split: {long}"


def keys_read(tree: ast.AST, sections: set[str]) -> set[tuple[str, str]]:
    """(section, key) of each `x.section.key`, also through `s = x.section` and `s.key`.

    A variable called `section` and `config[name]` are the section of any stage that trains.
    """
    short: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = (
                zip(target.elts, value.elts, strict=False)
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                else [(target, value)]
            )
            for to, of in pairs:
                if isinstance(to, ast.Name) and isinstance(of, ast.Attribute):
                    if of.attr in sections:
                        short[to.id] = of.attr
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if isinstance(owner, ast.Attribute) and owner.attr in sections:
                found.add((owner.attr, node.attr))
            elif isinstance(owner, ast.Name) and owner.id in short:
                found.add((short[owner.id], node.attr))
            elif isinstance(owner, ast.Name) and owner.id == "section":
                found |= {(stage, node.attr) for stage in TRAINING & sections}
            elif isinstance(owner, ast.Subscript) and ast.unparse(owner).endswith("config[name]"):
                found |= {(stage, node.attr) for stage in TRAINING & sections}
    return found


def test_keys_read_sees_through_short_names():
    source = "m, d = c.model, c.data; b = c.base; c.run.written = 1; f(m.depth, d.n, b.s, c.run.y)"
    read = keys_read(ast.parse(source), {"model", "data", "base", "run"})
    assert read == {("model", "depth"), ("data", "n"), ("base", "s"), ("run", "y")}


def test_every_key_is_read():
    from nanochat_jax import config

    default = config.load(config.CONFIGS / "default.py")
    keys = [tuple(key.split(".")) for key in config.flatten(default)]
    sections = {section for section, _ in keys}
    read = set()
    for file in code("nanochat_jax", "scripts"):
        for node in syntax(file).body:  # short names are those of one function or class
            read |= keys_read(node, sections)
    unread = [f"{section}.{key}" for section, key in keys if (section, key) not in read]
    assert not unread, f"configs/default.py has keys that nothing reads: {unread}"


def test_nothing_of_ours_is_ignored():
    """A bare `data/` in .gitignore would leave nanochat_jax/data out of every clone."""
    kept = set(files())
    here = [
        path.relative_to(ROOT).as_posix()
        for top in (*CODE, "tests", "constraints")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
    ]
    assert not [name for name in here if name not in kept]


def defines(file: str, name: str) -> bool:
    """Whether the module binds the name at its top level."""
    for node in ast.walk(syntax(file)):
        match node:
            case ast.FunctionDef() | ast.ClassDef() if node.name == name:
                return True
            case ast.Name(id=bound, ctx=ast.Store()) if bound == name:
                return True
            case ast.alias() if (node.asname or node.name.split(".")[0]) == name:
                return True
    return False


def test_imports_of_our_own_resolve_to_files_in_the_commit():
    modules = {module_name(file): file for file in code(*CODE)} | {"configs": "", "scripts": ""}
    missing = []
    for file in code(*CODE, "tests"):
        for module, name in imports(file):
            if module.split(".")[0] not in CODE:
                continue
            known = module in modules and (
                not name
                or f"{module}.{name}" in modules
                or (modules[module] and defines(modules[module], name))
            )
            if not known:
                missing.append(f"{file}: {module} {name}")
    assert not missing, "\n".join(missing)


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
    for file in code(*CODE):
        if file in MAY_EXECUTE:
            continue
        for node in ast.walk(syntax(file)):
            match node:
                case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                    wrong.append(f"{file}:{node.lineno}: {name}()")
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    wrong.append(f"{file}:{node.lineno}: allow_pickle")
        wrong += [
            f"{file}: imports {module}"
            for module, _ in imports(file)
            if module.split(".")[0] in {"pickle", "dill", "marshal", "shelve"}
        ]
    assert not wrong, "\n".join(wrong)


def test_no_broad_exception_is_swallowed():
    wrong = []
    for file in code(*CODE):
        for node in ast.walk(syntax(file)):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or ast.unparse(node.type) in (
                    "Exception",
                    "BaseException",
                )
                idle = all(isinstance(step, ast.Pass | ast.Continue) for step in node.body)
                if broad and idle:
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


def test_constraints_pin_every_dependency():
    """Exactly one version for each Python, no options, and nothing that is not pinned."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    for version in ("3.11", "3.12", "3.13", "3.14"):
        where = {"python_version": version, "python_full_version": f"{version}.0"}
        where |= {"sys_platform": "linux", "platform_machine": "x86_64"}
        chosen = [pin for pin in pins if not pin.marker or pin.marker.evaluate(where)]
        names = [pin.name for pin in chosen]
        assert len(names) == len(set(names)), f"two versions of one package for Python {version}"
        assert all(str(pin.specifier).startswith("==") for pin in chosen)
        assert {"jax", "jaxlib", "flax", "optax", "grain", "jax-cuda12-plugin"} <= set(names)

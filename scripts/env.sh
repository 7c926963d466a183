# Sourced by speedrun.sh and scripts/test.sh; works with bash 3.2. `ensure_env demo dev` sets $PY to a
# Python that has the package and these extras. It makes ./.venv, and brings it up to date, with uv
# where that is installed, else with venv and pip. From the environment:
#   PYTHON=python3.12         the interpreter to make ./.venv with
#   NANOCHAT_PYTHON=/a/python use this one as it is, and make nothing

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
MIN_MINOR=11 # Python 3.11, as in pyproject.toml

die() {
  echo "error: $*" >&2
  exit 1
}

duration() { # of so many seconds, as hours:minutes:seconds
  printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 % 3600 / 60)) $(($1 % 60))
}

count_gpus() { # NVIDIA GPUs that this run may use
  local visible="${CUDA_VISIBLE_DEVICES-all}" total
  total=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || total=0
  if [[ ! "${JAX_PLATFORMS:-cuda}" =~ cuda|gpu || "$visible" =~ ^(-1|NoDevFiles)?$ ]]; then total=0; fi
  if [[ "$visible" == all ]] || ((total == 0)); then echo "$total"; else
    tr ',' '\n' <<<"$visible" | grep -c .
  fi
}

version_of() { # "3.11.7" of an interpreter; fails when it does not run
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

ensure_env() { # extras wanted -> $PY
  PY="${NANOCHAT_PYTHON:-$VENV/bin/python}"
  if [[ -n "${NANOCHAT_PYTHON:-}" ]]; then
    version_of "$PY" >/dev/null || die "NANOCHAT_PYTHON=$PY does not run"
    echo "environment: $PY, as NANOCHAT_PYTHON says"
    return
  fi
  # Of two scripts started at once the second waits.
  if command -v flock >/dev/null; then exec 9>"$VENV.lock" && flock 9; fi
  local version made="" had="" packages extras
  version=$(version_of "$PY") || version="none"
  if [[ -f "$VENV/stamp" ]]; then { read -r made && read -r had; } <"$VENV/stamp" || true; fi
  packages="packages $(cat "$ROOT/pyproject.toml" "$ROOT"/constraints/*.txt | cksum)"
  extras=$(printf '%s\n' $had "$@" | sort -u | tr '\n' ' ') # what is there stays
  if [[ -n "${PYTHON:-}" && "$(version_of "$PYTHON")" != "$version" ]] ||
    [[ "$made" != "python $version in $ROOT, "* ]] || # moved: paths inside are wrong
    { ! command -v uv && ! "$PY" -m pip --version; } >/dev/null 2>&1; then
    make_venv
    version=$(version_of "$PY") made=""
  fi
  if [[ "$made" == "python $version in $ROOT, $packages" && "$had" == "${extras% }" ]]; then
    echo "environment: .venv is up to date (Python $version; extras: ${extras% })"
  else
    install_packages "${extras% }"
    printf '%s\n' "python $version in $ROOT, $packages" "${extras% }" >"$VENV/stamp"
  fi
  if command -v flock >/dev/null; then exec 9>&-; fi
}

make_venv() {
  local python version
  local -a pythons=("${PYTHON:-python3}") command
  if command -v uv >/dev/null; then # it finds a Python, or brings one
    command=(uv venv --quiet --python "${PYTHON:->=3.$MIN_MINOR,<3.15}")
  else
    [[ -n "${PYTHON:-}" ]] || pythons+=(python3.13 python3.12 python3.11 python3.14)
    for python in "${pythons[@]}" ""; do
      version=$(version_of "$python") && version=${version#3.} && ((${version%%.*} >= MIN_MINOR)) && break
    done
    [[ -n "$python" ]] ||
      die "${PYTHON:-python3} is no Python 3.$MIN_MINOR or newer; install one (PYTHON=... names it), or uv"
    command=("$python" -m venv)
  fi
  echo "environment: making .venv with ${command[*]}"
  rm -rf "$VENV"
  "${command[@]}" "$VENV" ||
    die "$VENV could not be made (the message is above); install python3-venv (apt has it), or uv"
}

install_packages() { # extras, space-separated
  local start=$SECONDS quiet=--quiet
  local -a command=("$PY" -m pip install --disable-pip-version-check --no-input)
  if command -v uv >/dev/null; then command=(uv pip install --python "$PY"); fi
  if [[ -t 1 ]]; then quiet=""; fi # on a terminal the tool shows how far it is
  echo "environment: installing the pinned packages with ${command[*]:0:2} (extras: $1), some minutes"
  # Wheels only: nothing but this project itself is built here.
  (cd "$ROOT" && "${command[@]}" $quiet --only-binary :all: -c constraints/constraints.txt \
    -e ".[${1// /,}]" 9>&-) ||
    die "the packages could not be installed (the message is above); is there a network?"
  echo "environment: ready after $(duration $((SECONDS - start)))"
}

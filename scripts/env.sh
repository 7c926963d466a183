# The environment of speedrun.sh and scripts/test.sh, which source this file. Works with bash 3.2.
#
#   . scripts/env.sh
#   ensure_env demo dev       # afterwards $PY is a Python that has the package and these extras
#
# It makes ./.venv when that is missing and brings it up to date when pyproject.toml or the
# constraints changed: with uv where that is installed, else with venv and pip. From the environment:
#   PYTHON=python3.12         the interpreter to make ./.venv with
#   NANOCHAT_PYTHON=/a/python use this one as it is, and make nothing

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
MIN_MINOR=11 # Python 3.11, as in pyproject.toml

die() {
  echo "error: $*" >&2
  exit 1
}

duration() { # seconds, as a person says them
  if (($1 < 60)); then echo "$1 s"; elif (($1 < 3600)); then echo "$(($1 / 60)) min $(($1 % 60)) s"; else
    echo "$(($1 / 3600)) h $(($1 % 3600 / 60)) min"
  fi
}

count_gpus() { # NVIDIA GPUs that this run may use
  local visible="${CUDA_VISIBLE_DEVICES-all}" total
  case "${JAX_PLATFORMS:-}" in "" | *cuda* | *gpu*) ;; *) echo 0 && return ;; esac
  total=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || total=0
  case "$visible" in
    all) ;;
    "" | -1 | NoDevFiles) total=0 ;;
    *) if ((total > 0)); then total=$(tr ',' '\n' <<<"$visible" | grep -c .); fi ;;
  esac
  echo "$total"
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
  if command -v flock >/dev/null; then # two scripts started at once: the second waits
    exec 9>"$VENV.lock"
    flock 9
  fi
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
  if command -v uv >/dev/null; then # it finds a Python, or brings one
    python="${PYTHON:->=3.$MIN_MINOR,<3.15}"
    echo "environment: making .venv with uv, Python $python"
    rm -rf "$VENV"
    uv venv --quiet --python "$python" "$VENV" || die "uv could not make $VENV (its message is above)"
    return
  fi
  for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14; do
    version=$(version_of "$python") || version=0.0
    version=${version#3.}
    if ((${version%%.*} >= MIN_MINOR)); then break; fi
    if [[ -n "${PYTHON:-}" || "$python" == python3.14 ]]; then
      die "${PYTHON:-python3} is no Python 3.$MIN_MINOR or newer; install one (PYTHON=... names it), or uv"
    fi
  done
  echo "environment: making .venv with $python"
  rm -rf "$VENV"
  "$python" -m venv "$VENV" ||
    die "$python could not make $VENV; install venv (Debian, Ubuntu: apt install python3-venv), or uv"
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

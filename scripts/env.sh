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
NETWORK_ERRORS='name resolution|dns error|failed to resolve|network is unreachable|timed out'
NETWORK_ERRORS+='|NewConnectionError|connection refused|error sending request|proxyerror'

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

find_python() { # the first interpreter that is new enough; fails with what was found instead
  local candidate version found=""
  local -a candidates=(python3 python3.13 python3.12 python3.11 python3.14)
  if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    version=$(version_of "$candidate") || continue
    case "$version" in
      3.*) if (($(cut -d. -f2 <<<"$version") >= MIN_MINOR)); then echo "$candidate" && return; fi ;;
    esac
    found="${found:+$found, }$candidate is $version"
  done
  echo "${found:-found none}"
  return 1
}

venv_identity() { # what ./.venv must have been made from to be up to date
  echo "$(cat "$ROOT/pyproject.toml" "$ROOT"/constraints/*.txt | cksum) python $1 in $ROOT"
}

ensure_env() { # extras wanted -> $PY
  if [[ -n "${NANOCHAT_PYTHON:-}" ]]; then
    version_of "$NANOCHAT_PYTHON" >/dev/null || die "NANOCHAT_PYTHON=$NANOCHAT_PYTHON does not run"
    PY="$NANOCHAT_PYTHON"
    echo "environment: $PY, as NANOCHAT_PYTHON says"
    return
  fi
  PY="$VENV/bin/python"
  if command -v flock >/dev/null; then # two scripts started at once: the second waits
    exec 9>"$VENV.lock"
    flock 9
  fi
  local extras="" extra old_identity="" old_extras="" version=""
  if [[ -f "$VENV/stamp" ]]; then { read -r old_identity && read -r old_extras; } <"$VENV/stamp" || true; fi
  for extra in $(printf '%s\n' $old_extras "$@" | sort -u); do extras="${extras:+$extras }$extra"; done
  version=$(version_of "$PY") || old_identity=""
  if [[ -n "${PYTHON:-}" && "$(version_of "$PYTHON")" != "$version" ]]; then old_identity=""; fi
  case "$old_identity" in *" in $ROOT") ;; *) old_identity="" ;; esac # moved: paths inside are wrong
  if [[ "$old_identity" == "$(venv_identity "$version")" && "$old_extras" == "$extras" ]]; then
    echo "environment: .venv is up to date (Python $version; extras: $extras)"
  else
    if [[ -z "$old_identity" ]] || { ! command -v uv && ! "$PY" -m pip --version; } >/dev/null 2>&1; then
      make_venv
    fi
    install_packages "$extras"
    printf '%s\n%s\n' "$(venv_identity "$(version_of "$PY")")" "$extras" >"$VENV/stamp"
  fi
  if command -v flock >/dev/null; then exec 9>&-; fi
}

make_venv() {
  local python
  if python=$(find_python); then
    echo "environment: making .venv with $python, Python $(version_of "$python")"
  elif [[ -n "${PYTHON:-}" ]]; then
    die "PYTHON=$PYTHON: $python; expected 3.$MIN_MINOR or newer"
  elif command -v uv >/dev/null; then
    echo "environment: no Python 3.$MIN_MINOR or newer ($python); uv brings its own"
    python=3.12
  elif [[ "$python" == "found none" ]]; then
    die "python3 is missing; install Python 3.$MIN_MINOR or newer, or uv"
  else
    die "Python 3.$MIN_MINOR or newer is needed, but $python; install one (PYTHON=... names it), or uv"
  fi
  rm -rf "$VENV"
  if command -v uv >/dev/null; then
    uv venv --quiet --python "$python" "$VENV" || die "uv could not make $VENV (its message is above)"
  else
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
      die "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv), or uv"
    "$python" -m venv "$VENV" || die "$python could not make $VENV (its message is above)"
  fi
}

install_packages() { # extras, space-separated
  local tool=pip log="$VENV/install.log" start=$SECONDS target=".[${1// /,}]"
  local -a command=("$PY" -m pip install --disable-pip-version-check --no-input)
  if command -v uv >/dev/null; then
    tool=uv
    command=(uv pip install --python "$PY")
  fi
  echo "environment: installing the pinned packages with $tool (extras: $1; log: .venv/install.log)"
  # Wheels only: nothing but this project itself is built here.
  if ! (
    exec 9>&- # the lock stays with this script, not with what outlives it by a second
    ticker "$start" &
    ticker=$!
    trap 'kill $ticker 2>/dev/null' EXIT
    cd "$ROOT" && "${command[@]}" --only-binary :all: -c constraints/constraints.txt -e "$target" \
      >"$log" 2>&1
  ); then
    if grep -qiE "$NETWORK_ERRORS" "$log"; then
      die "no network: $tool could not reach the package index (whole log: $log)"
    fi
    tail -n 15 "$log" >&2
    die "$tool could not install the packages (whole log: $log)"
  fi
  echo "environment: ready after $(duration $((SECONDS - start)))"
}

ticker() { # shows that it is still at work: in place on a terminal, a line each half minute elsewhere
  while sleep 1 >/dev/null 2>&1; do # holding no pipe that someone reads to its end
    if [[ -t 1 ]]; then
      printf '\r  %s ...\r' "$(duration $((SECONDS - $1)))"
    elif (((SECONDS - $1) % 30 == 0)); then
      echo "  still installing, $(duration $((SECONDS - $1)))"
    fi
  done
}

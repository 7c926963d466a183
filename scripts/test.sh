#!/usr/bin/env bash
# Lint, types and tests, in the environment that it makes itself.
#
#   bash scripts/test.sh                       everything that is quick
#   bash scripts/test.sh --all                 slow and long tests too (CI=true: the slow ones)
#   bash scripts/test.sh --gpu                 the tests that need an NVIDIA GPU, and only those
#   bash scripts/test.sh tests/data -k pack    further words go to pytest
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

which="not slow and not long and not gpu"
if [[ "${CI:-}" == true ]]; then which="not long and not gpu"; fi
case "${1:-}" in
  --all) which="not gpu" && shift ;;
  --gpu) which="gpu" && export NANOCHAT_TEST_GPU=1 && shift ;;
esac

if [[ "$which" == gpu ]]; then ensure_env demo dev gpu; else ensure_env demo dev; fi
cd "$ROOT"
failed=""
step() { # all of them run, so that one look shows everything
  local name="$1" start=$SECONDS
  shift
  echo "--- $name"
  "$@" || failed="${failed:+$failed, }$name"
  echo "--- $name: $(duration $((SECONDS - start)))"
}
step "ruff check" "$PY" -m ruff check .
step "ruff format" "$PY" -m ruff format --check .
# The version is pinned: do not ask the network for a newer one.
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 step "pyright" "$PY" -m pyright --pythonpath "$PY" --warnings
# A process a core; the tests of a file share what they train, so they stay together.
step "pytest" "$PY" -m pytest -n logical --maxprocesses 4 --dist loadfile -m "$which" "$@"
[[ -z "$failed" ]] || die "failed: $failed"

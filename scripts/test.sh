#!/usr/bin/env bash
# Lint, types and tests, in the environment that it makes itself.
#
#   bash scripts/test.sh                       everything that is quick
#   bash scripts/test.sh --all                 slow and long tests too (CI=true: the slow ones)
#   bash scripts/test.sh --gpu                 the tests that need an NVIDIA GPU, and only those
#   bash scripts/test.sh tests/data -k pack    further words go to pytest
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

which="not slow and not long and not gpu" extras="demo dev"
if [[ "${CI:-}" == true ]]; then which="not long and not gpu"; fi
case "${1:-}" in
  --all) which="not gpu" && shift ;;
  --gpu) which="gpu" extras="demo dev gpu" && export NANOCHAT_TEST_GPU=1 && shift ;;
esac
ensure_env $extras
cd "$ROOT"

export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # the version is pinned: do not look for a newer one
lint() { # all three, so that one look shows everything
  local failed=0
  "$PY" -m ruff check . || failed=1
  "$PY" -m ruff format --check . || failed=1
  "$PY" -m pyright --pythonpath "$PY" --warnings || failed=1
  return $failed
}
log=$(mktemp) failed=""
lint >"$log" 2>&1 & # beside the tests
lint=$!
# A process a core; each begins with neighbouring tests, because those of a file share what they train.
"$PY" -m pytest -n logical --maxprocesses 4 --dist worksteal -m "$which" "$@" || failed="tests"
wait $lint || failed+=" lint"
cat "$log" && rm "$log"
[[ -z "$failed" ]] || die "failed: $failed"

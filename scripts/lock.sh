#!/usr/bin/env bash
# Write constraints/constraints.txt anew: every version of every extra, for all Pythons and systems.
# But `clients`: lm-eval needs packages that come only as sources, and old versions of ours. Needs uv. Add --upgrade for newer versions, --upgrade-package=NAME for one; then run the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv pip compile pyproject.toml --universal --extra gpu --extra demo --extra dev \
  --only-binary :all: --no-emit-index-url \
  --custom-compile-command "bash scripts/lock.sh" --output-file constraints/constraints.txt --quiet "$@"

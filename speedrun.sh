#!/usr/bin/env bash
# From raw text to a chat model and a report about it, on one machine:
#
#   bash speedrun.sh                                   picks a recipe for this machine, says why
#   bash speedrun.sh --config=configs/d26.py           another recipe (or CONFIG=configs/d26.py)
#   bash speedrun.sh --config.run.name=try2            any key of configs/default.py
#   NANOCHAT_BASE_DIR=/big/disk bash speedrun.sh       where everything is written
#
# Run it again whenever it stopped: finished stages are skipped, the interrupted one continues.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/env.sh"

# Stages in order: script and its arguments | what it is called on screen.
STAGES=(
  "data.py ensure | text to train on: download it or build it"
  "tok_train.py   | train the tokenizer"
  "tok_eval.py    | how well it compresses, beside GPT-2's and GPT-4's"
  "train.py       | pretrain the base model"
  "base_eval.py   | evaluate it: bits per byte, CORE, samples"
  "mid_train.py   | mid-training: conversations, multiple choice, tools"
  "chat_eval.py --config.eval.chat_stage=mid | what it can do now"
  "chat_sft.py    | fine-tune on what an assistant says"
  "chat_eval.py --config.eval.chat_stage=sft | what it can do now"
  "chat_rl.py     | practise on questions with an answer"
  "chat_eval.py --config.eval.chat_stage=rl | what it can do now"
  "report.py      | write the report"
)
EXIT_RESUME_ME=75 # a stage says: interrupted, and saved (nanochat_jax/common.py)

pick_recipe() { # -> $recipe, $reason
  local given="$1" gpus
  gpus=$(count_gpus)
  if [[ -n "$given" ]]; then
    recipe="$given" reason="as you asked"
  elif ((gpus == 0)); then
    recipe=configs/demo.py reason="no NVIDIA GPU here, and this recipe needs minutes on a CPU"
  else
    recipe=configs/d20.py reason="found $gpus NVIDIA GPU$( ((gpus == 1)) || echo s)"
    if ((gpus < 8)); then
      reason+="; it is made for 8, so this takes $(awk "BEGIN { printf \"%.3g\", 8 / $gpus }") times as long"
      reason+=" (CONFIG=configs/demo.py takes minutes)"
    fi
  fi
  if [[ ! -f "$recipe" && -f "$ROOT/$recipe" ]]; then recipe="$ROOT/$recipe"; fi
  [[ -f "$recipe" ]] || die "no recipe at $recipe; there are $(cd "$ROOT" && echo configs/*.py)"
}

signalled=""
pass_signal() { # a job of its own gets no Ctrl-C from the terminal: hand the signal on, then wait
  signalled=$1
  kill -"$1" "$child" 2>/dev/null || true
}

run_stage() { # number, what it does, script and arguments... ; stops everything unless it succeeds
  local number=$1 what=$2 script=$3 start=$SECONDS status=0
  shift 3
  printf '\n[%s/%s] %s (%s since the start)\n' "$number" "${#STAGES[@]}" "$what" "$(duration $SECONDS)"
  set -m # so that a kill, a closed terminal or Ctrl-C reaches the stage, and it can save its state
  "$PY" "$ROOT/scripts/$script" "$@" &
  child=$!
  set +m
  until { wait "$child" && status=0 || status=$?; } && [[ -z "$signalled" ]]; do
    signalled="" interrupted=yes # wait returned early; the stage is still saving
  done
  if ((status == 0)) && [[ -z "$interrupted" ]]; then
    echo "[$number/${#STAGES[@]}] done in $(duration $((SECONDS - start)))"
    return
  fi
  if ((status == EXIT_RESUME_ME || status == 0)) || [[ -n "$interrupted" && $status -ge 130 ]]; then
    echo "stopped after $(duration $SECONDS), finished steps are saved; to continue, run the same command again" >&2
    exit $EXIT_RESUME_ME
  fi
  echo "error: [$number/${#STAGES[@]}] $what: exit status $status; run the same command again once it is" \
    "mended (finished stages are kept)" >&2
  exit "$status"
}

# Command line: the recipe is for us, the other keys are for every stage.
given="${CONFIG:-}"
overrides=()
while (($# > 0)); do
  case "$1" in
    --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
    --config=*) given="${1#*=}" ;;
    --config.*=*) overrides+=("$1") ;;
    --config | --config.*)
      (($# > 1)) || die "$1 needs a value; write $1=VALUE"
      set -- "$1=$2" "${@:3}"
      continue
      ;;
    *) die "unknown argument '$1'; expected --config=FILE or --config.section.key=value" ;;
  esac
  shift
done

pick_recipe "$given"
echo "recipe: ${recipe#"$ROOT"/}, $reason"
if (($(count_gpus) > 0)); then ensure_env demo gpu; else ensure_env demo; fi
arguments=(--config="$recipe" ${overrides[@]+"${overrides[@]}"})
run_dir=$("$PY" -c '
from nanochat_jax import common, config
common.run_main(lambda: print(common.run_dir(config.load_from_argv(None).run.name)))
' "${arguments[@]}")
echo "results: $run_dir"

child="" interrupted=""
trap 'pass_signal INT' INT
trap 'pass_signal TERM' TERM HUP
number=0
for stage in "${STAGES[@]}"; do
  number=$((number + 1))
  read -ra words <<<"${stage%%|*}"
  run_stage $number "${stage#*| }" "${words[@]}" "${arguments[@]}"
done
printf '\nAll done in %s. The report: %s\n' "$(duration $SECONDS)" "$run_dir/report/report.md (and .html)"
printf 'Talk to it:'
printf ' %q' "$PY" "$ROOT/scripts/chat_cli.py" "${arguments[@]}"
echo

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

EXIT_RESUME_ME=75 # a stage says: interrupted, and saved (nanochat_jax/common.py)

stages() { # the table of contents
  stage "text to train on: download it or build it"            data.py ensure
  stage "train the tokenizer"                                  tok_train.py
  stage "how well it compresses, beside GPT-2's and GPT-4's"   tok_eval.py
  stage "pretrain the base model"                              train.py
  stage "evaluate it: bits per byte, CORE, samples"            base_eval.py
  stage "mid-training: conversations, multiple choice, tools"  mid_train.py
  stage "what it can do now"                                   chat_eval.py --config.eval.chat_stage=mid
  stage "fine-tune on what an assistant says"                  chat_sft.py
  stage "what it can do now"                                   chat_eval.py --config.eval.chat_stage=sft
  stage "practise on questions with an answer"                 chat_rl.py
  stage "what it can do now"                                   chat_eval.py --config.eval.chat_stage=rl
  stage "write the report"                                     report.py
}

main() {
  local recipe="${CONFIG:-}" reason="as you asked" gpus extras="demo" script
  arguments=() # of every stage, after --config
  while (($# > 0)); do
    case "$1" in
      --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
      --config=*) recipe="${1#*=}" ;;
      --config.*=*) arguments+=("$1") ;;
      --config | --config.*)
        (($# > 1)) || die "$1 needs a value; write $1=VALUE"
        set -- "$1=$2" "${@:3}"
        continue
        ;;
      *) die "unknown argument '$1'; expected --config=FILE or --config.section.key=value" ;;
    esac
    shift
  done
  gpus=$(count_gpus)
  if ((gpus > 0)); then extras="demo gpu"; fi
  if [[ -z "$recipe" ]]; then pick_recipe "$gpus"; fi
  if [[ ! -f "$recipe" && -f "$ROOT/$recipe" ]]; then recipe="$ROOT/$recipe"; fi
  [[ -f "$recipe" ]] || die "no recipe at $recipe; there are $(cd "$ROOT" && echo configs/*.py)"
  echo "recipe: ${recipe#"$ROOT"/}, $reason"
  ensure_env $extras
  arguments=(--config="$recipe" ${arguments[@]+"${arguments[@]}"})
  number=0 child="" interrupted=""
  trap 'pass_signal INT' INT
  trap 'pass_signal TERM' TERM HUP
  watch
  stages
  printf '\nAll done in %s. Talk to it in the browser, or here:\n' "$(duration $SECONDS)"
  for script in chat_web.py chat_cli.py; do
    printf '%s' "${NANOCHAT_BASE_DIR:+ NANOCHAT_BASE_DIR=$(printf %q "$NANOCHAT_BASE_DIR")}"
    printf ' %q' "$PY" "$ROOT/scripts/$script" "${arguments[@]}"
    echo
  done
}

watch() { # a page about the run, on a free port of this machine; it prints its address
  if [[ "${SLURM_PROCID:-}${OMPI_COMM_WORLD_RANK:-}${JOB_COMPLETION_INDEX:-}" == *[1-9]* ]]; then
    return # of several processes one shows it
  fi
  in_own_job report.py --serve --port=0 --until=$$ "${arguments[@]}"
  # The run neither waits for it nor depends on it; whatever ends the run ends it too.
  trap "kill $child 2>/dev/null || true" EXIT
}

in_own_job() { # script and arguments -> $child; a kill, a closed terminal or Ctrl-C come from us
  set -m
  "$PY" "$ROOT/scripts/$1" "${@:2}" &
  child=$!
  set +m
}

pick_recipe() { # number of GPUs -> $recipe, $reason
  recipe=configs/d20.py reason="$1 NVIDIA GPU(s) here"
  if (($1 == 0)); then
    recipe=configs/demo.py reason="no NVIDIA GPU here, and this recipe needs minutes on a CPU"
  elif (($1 < 8)); then
    reason+="; it is made for 8, so this takes $(awk "BEGIN { printf \"%.3g\", 8 / $1 }") times as long"
    reason+=" (CONFIG=configs/demo.py takes minutes)"
  fi
}

pass_signal() { # the stage gets no Ctrl-C from the terminal: hand the signal on, then wait
  interrupted=yes signalled=yes
  kill -"$1" "$child" 2>/dev/null || true
}

stage() { # what it does, script and arguments ... ; stops everything unless it succeeds
  local what=$1 script=$2 start=$SECONDS status=0
  local name="[$((number += 1))/$(declare -f stages | grep -c 'stage "')]"
  printf '\n%s %s (%s since the start)\n' "$name" "$what" "$(duration $SECONDS)"
  in_own_job "$script" "${@:3}" "${arguments[@]}"
  signalled=yes
  while [[ -n "$signalled" ]]; do # a signal ends `wait`, while the stage is still saving
    signalled="" status=0
    wait "$child" || status=$?
  done
  if [[ $status == 0 && -z "$interrupted" ]]; then
    echo "$name done in $(duration $((SECONDS - start)))"
  elif ((status == EXIT_RESUME_ME || status == 0)) || [[ -n "$interrupted" && $status -ge 130 ]]; then
    echo "stopped after $(duration $SECONDS), finished steps are saved; to continue, run the same command again" >&2
    exit $EXIT_RESUME_ME
  else
    echo "error: $name exit status $status; once it is mended, run the same command again to continue" >&2
    exit "$status"
  fi
}

main "$@"

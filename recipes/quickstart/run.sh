#!/bin/sh
# The quickstart: make the tiny model and its data, train it by sft and then by ppo, and print the accuracy before
# and after each stage. Everything on the CPU, nothing downloaded.
#
#   recipes/quickstart/run.sh [OUT]     OUT: directory for everything it writes, default .quickstart; run again, it
#                                       continues what was interrupted and prints the table
#
# RLHFCTL and PYTHON name the two commands it calls (default: rlhfctl and python from PATH).
set -eu

out=${1:-.quickstart}
rlhfctl=${RLHFCTL:-rlhfctl}
python=${PYTHON:-python}
sft=$out/sft
ppo=$out/ppo

# train TASK RUN [KEY=VALUE]...: a run that is there already goes on where it stopped, a finished one is left as it is.
train() {
    task=$1 run=$2
    shift 2
    if [ -e "$run/recipe.yaml" ]; then
        "$rlhfctl" "$task" --resume --run-dir "$run"
    else
        "$rlhfctl" "$task" "quickstart/$task" --run-dir "$run" "$@"
    fi
}

"$python" -m rlhfctl.quickstart.chains "$out" --seed 0 >&2

train sft "$sft" \
    policy.from_config="$out/model" policy.tokenizer="$out/model" \
    data.train="[{path: $out/data/sft.jsonl, format: prompt_response}]" \
    data.eval="[{path: $out/data/eval.jsonl, format: qa}]"

train ppo "$ppo" \
    policy.path="$sft/final" \
    data.train="[{path: $out/data/prompts.jsonl, format: qa}]" \
    data.eval="[{path: $out/data/eval.jsonl, format: qa}]"

echo
"$python" -m rlhfctl.quickstart.table "$sft" "$ppo"

#!/bin/sh
# The quickstart: make the tiny model and its data, train it by sft and then by ppo, and print the accuracy before
# and after each stage. Everything on the CPU, nothing downloaded.
#
#   recipes/quickstart/run.sh [OUT]     OUT: directory for everything it writes, default .quickstart
#
# RLHFCTL and PYTHON name the two commands it calls (default: rlhfctl and python from PATH).
set -eu

out=${1:-.quickstart}
rlhfctl=${RLHFCTL:-rlhfctl}
python=${PYTHON:-python}
sft=$out/sft
ppo=$out/ppo

for run in "$sft" "$ppo"; do
    if [ -e "$run" ]; then
        echo "run.sh: $run holds an earlier run; remove $out or name another directory" >&2
        exit 2
    fi
done

"$python" -m rlhfctl.quickstart.chains "$out" --seed 0 >&2

"$rlhfctl" sft quickstart/sft --run-dir "$sft" \
    policy.from_config="$out/model" policy.tokenizer="$out/model" \
    data.train="[{path: $out/data/sft.jsonl, format: prompt_response}]" \
    data.eval="[{path: $out/data/eval.jsonl, format: qa}]"

"$rlhfctl" ppo quickstart/ppo --run-dir "$ppo" \
    policy.path="$sft/final" \
    data.train="[{path: $out/data/prompts.jsonl, format: qa}]" \
    data.eval="[{path: $out/data/eval.jsonl, format: qa}]"

echo
"$python" -m rlhfctl.quickstart.table "$sft" "$ppo"

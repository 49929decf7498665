#!/bin/sh
# The quickstart: make the tiny models and their data, train them stage by stage, and print what each stage did. A policy
# by sft and ppo; one by reft; one by oreo, offline from 16,000 samples of the sft policy; a reward model by rm; and a
# policy of another vocabulary and chat template by ppo against that reward model, served by another process. At the end
# eval compares oreo's policy with the sft policy, and the report shows all runs. On the CPU, nothing downloaded.
#
#   recipes/quickstart/run.sh [OUT]     OUT: directory for everything it writes, default .quickstart; run again, it
#                                       continues what was interrupted and prints the table
#
# Every stage runs on half of the cores, for these models gain nothing from more, and after the first one two run side by
# side: ppo, reft and oreo are shown; rm, sft-b and served-rm write OUT/beside.log.
#
# RLHFCTL and PYTHON name the two commands it calls (default: rlhfctl and python from PATH); SEED is that of the task,
# OMP_NUM_THREADS the threads of one stage.
set -eu

out=${1:-.quickstart}
rlhfctl=${RLHFCTL:-rlhfctl}
python=${PYTHON:-python}
data=$out/data
evaluation="data.eval=[{path: $data/eval.jsonl, format: qa}]"
server= lane= running=

# train TASK RECIPE RUN [KEY=VALUE]...: a run that is there already goes on where it stopped, a finished one is left as
# it is. `moved` holds the keys that may be others when it goes on.
moved=
train() {
    task=$1 recipe=$2 run=$3
    shift 3
    if [ -e "$run/recipe.yaml" ]; then
        $within "$rlhfctl" "$task" --resume --run-dir "$run" ${moved:+"$moved"}
    else
        $within "$rlhfctl" "$task" "quickstart/$recipe" --run-dir "$run" "$@" ${moved:+"$moved"}
    fi
}

# apart COMMAND...: as a child that `stop` can end, since a shell answers no signal while it waits for a command.
within=
apart() {
    "$@" &
    running=$!
    wait "$running"
    running=
}

stop() {
    for child in $running $server $lane; do
        kill "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    done
    running= server= lane=
}
trap stop EXIT
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM

# serve MODEL: its address in $url once /health answers; a free port of this machine, nobody else can connect.
serve() {
    : >"$out/serve-rm.url"
    "$rlhfctl" serve-rm "$1" --port 0 -q >"$out/serve-rm.url" &
    server=$!
    until [ -s "$out/serve-rm.url" ]; do
        kill -0 "$server" 2>/dev/null || { wait "$server"; exit; }
        sleep 0.2
    done
    url=$(cat "$out/serve-rm.url")
    "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/health", timeout=60)' "$url"
}

"$python" -m rlhfctl.quickstart.chains "$out" --seed "${SEED:-0}" >&2

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS=$("$python" -c 'from rlhfctl.preflight.devices import cores; print(max(1, cores() // 2))')
    export OMP_NUM_THREADS
fi

train sft sft "$out/sft" \
    policy.from_config="$out/model" policy.tokenizer="$out/model" \
    data.train="[{path: $data/sft.jsonl, format: prompt_response}]" "$evaluation"

# The reward model and what learns from it, beside the other stages.
beside() {
    within=apart
    train rm rm "$out/rm" \
        policy.path="$out/sft/final" \
        data.train="[{path: $data/pairs.jsonl, format: preference}, {path: $data/steps.jsonl, format: stepwise}]" \
        data.eval="[{path: $data/pairs_eval.jsonl, format: preference}]"

    train sft sft-b "$out/sft-b" \
        policy.from_config="$out/model-b" policy.tokenizer="$out/model-b" \
        data.train="[{path: $data/sft.jsonl, format: prompt_response}]" "$evaluation"

    if [ ! -e "$out/served-rm/final/config.json" ]; then
        serve "$out/rm/final"
        moved=reward.sources.0.url=$url
    fi
    train ppo served-rm "$out/served-rm" \
        policy.path="$out/sft-b/final" data.train="[{path: $data/prompts.jsonl, format: qa}]" "$evaluation"

    $within "$rlhfctl" eval "$out/sft" --out "$out/eval-sft" -q
}

echo "beside the following stages: rm, sft-b, served-rm; their lines are in $out/beside.log" >&2
(
    trap stop EXIT
    trap 'exit 143' TERM
    beside
) >"$out/beside.log" 2>&1 &
lane=$!

train ppo ppo "$out/ppo" \
    policy.path="$out/sft/final" data.train="[{path: $data/prompts.jsonl, format: qa}]" "$evaluation"

train reft reft "$out/reft" \
    policy.from_config="$out/model" policy.tokenizer="$out/model" \
    data.train="[{path: $data/sft.jsonl, format: prompt_response}]" "$evaluation" \
    warmup.steps=400 train.steps=80 train.eval_every=240

if [ ! -e "$out/trajectories.jsonl" ]; then
    "$rlhfctl" eval "$out/sft" --data "$data/prompts.jsonl" --search sample -n 8 \
        --save-trajectories "$out/trajectories.jsonl" >&2
fi
train oreo oreo "$out/oreo" \
    policy.path="$out/sft/final" data.train="[{path: $out/trajectories.jsonl, format: trajectory}]" "$evaluation"

wait "$lane" || {
    code=$?
    tail -n 20 "$out/beside.log" >&2
    exit "$code"
}
lane=

echo
"$rlhfctl" eval "$out/oreo" --compare "$out/eval-sft" -q
echo
set -- "$out/sft" "$out/ppo" "$out/reft" "$out/oreo" "$out/rm" "$out/sft-b" "$out/served-rm"
"$python" -m rlhfctl.quickstart.table "$@"
printf '\nreport: '
"$rlhfctl" report "$@" --out "$out/report.html" -q

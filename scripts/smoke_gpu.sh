#!/usr/bin/env bash
# Does it work on this machine's GPU? Ten minutes, one GPU of 48 GB (evaluation is float32), 40 GB of disk, no network: random
# models in the shapes of Mistral-7B and Qwen1.5-0.5B, SAEs of 131,072 and 32,768 features trained for some steps, cut in the
# middle and gone on with, evaluated on both models; before them the tests that need a GPU. Exits 0, 1 when something failed, 2
# without a GPU or an installation. It leaves nothing behind.
#   scripts/smoke_gpu.sh            what is made lies below TMPDIR meanwhile
#   scripts/smoke_gpu.sh --small    the same in small on the CPU
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled PYTHONUNBUFFERED=1

device=cuda
case "${1:-}" in
--small) device=cpu ;;
"") ;;
*) echo "smoke_gpu.sh: got $1; expected --small or nothing" >&2 && exit 2 ;;
esac
if [[ ! -x $python ]]; then
    echo "smoke_gpu.sh: $python is not there; scripts/setup.sh makes it" >&2
    exit 2
fi
if [[ $device == cuda ]] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "smoke_gpu.sh needs a CUDA GPU, and torch sees none; --small runs in small on the CPU" >&2
    exit 2
fi

work="$(mktemp -d)"
child=""
finish() {
    [[ -z $child ]] || kill "$child" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
fail() {
    echo "FAILED: $1" >&2
    [[ ! -s $work/log ]] || tail -n 30 "$work/log" >&2
    exit 1
}

# What is done, and how long it took; its output is shown when it fails.
step() {
    local name="$1" from=$SECONDS
    shift
    "$@" >"$work/log" 2>&1 || fail "$name"
    echo "$name: $((SECONDS - from)) s"
}

sae_transfer() { "$python" -m sae_transfer "$@" --device "$device"; }

# A pair on disk, and a study over it: name, then options of make_random_pair.py.
make_pair() { step "$1: models and token ids" "$python" "$root/scripts/make_random_pair.py" "$1" "$work/$1" "${@:2}"; }

# Train, but ask it to stop once it has begun with the steps; it must say with 75 that it can go on, and then do so.
train_with_a_cut() {
    local name="$1" from=$SECONDS code=0
    "$python" -m sae_transfer train "$work/$name/study.yaml" --out "$work/$name/run" --device "$device" >"$work/log" 2>&1 &
    child=$!
    until compgen -G "$work/$name/run/saes/*/train_log.jsonl" >/dev/null && grep -q "^train base" "$work/log"; do
        kill -0 "$child" 2>/dev/null || fail "$name: training ended before it could be cut"
        sleep 0.1
    done
    kill -TERM "$child"
    wait "$child" || code=$?
    child=""
    ((code == 75)) || fail "$name: a training asked to stop exited with $code, not with 75"
    compgen -G "$work/$name/run/saes/*/checkpoints/*" >/dev/null || fail "$name: the cut training left no checkpoint"
    echo "$name: training, cut: $((SECONDS - from)) s"
    step "$name: training, gone on with" sae_transfer train "$work/$name/study.yaml" --out "$work/$name/run"
    grep -q "going on from the checkpoint" "$work/log" || fail "$name: the training began anew"
}

# Every SAE on both models, and every number finite.
evaluate() {
    step "$1: cross-evaluation" sae_transfer cross-eval "$work/$1/study.yaml" --out "$work/$1/run"
    "$python" - "$work/$1/run" >"$work/log" 2>&1 <<'PYTHON' || fail "$1: results are not what they should be"
import csv, json, math, pathlib, sys

run = pathlib.Path(sys.argv[1])
rows = list(csv.DictReader((run / "cross_eval" / "rows.csv").open()))
assert {(row["model"], row["outliers"]) for row in rows} == {
    (model, policy) for model in ("base", "chat") for policy in ("excluded", "kept")
}, rows
for row in rows:
    for key in ("l0", "ce_clean", "ce_sae", "ce_zero", "kl", "mse"):
        assert math.isfinite(float(row[key])), (key, row)
for log in run.glob("saes/*/train_log.jsonl"):
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps, "the training curve has gaps or repeats"
PYTHON
}

if [[ $device == cuda ]]; then
    step "tests on the GPU" "$python" -m pytest -m gpu -p no:cacheprovider --basetemp "$work/pytest" "$root/tests"
    make_pair qwen1.5-0.5b --width 32768 --train-tokens 4194304 --evaluation-tokens 32768 --context 2048 --batch 4096
    train_with_a_cut qwen1.5-0.5b
    evaluate qwen1.5-0.5b
    rm -rf "$work/qwen1.5-0.5b"
    make_pair mistral-7b --width 131072 --train-tokens 524288 --evaluation-tokens 16384 --context 2048 --batch 4096
    train_with_a_cut mistral-7b
    evaluate mistral-7b
else
    make_pair qwen-tiny --width 256 --train-tokens 150000 --evaluation-tokens 1024 --context 64 --batch 64
    train_with_a_cut qwen-tiny
    evaluate qwen-tiny
    make_pair mistral-tiny --width 512 --train-tokens 150000 --evaluation-tokens 1024 --context 64 --batch 64
    train_with_a_cut mistral-tiny
    evaluate mistral-tiny
fi
echo "all well: $SECONDS s"

#!/bin/sh
# Every step of training that should be measured on an accelerator, in one go: some 20 minutes of one GPU.
#
#     sh benchmarks/accelerator.sh runs/accelerator
#
# Five rounds of 30 steps of every method in float32 weights with bfloat16 autocast, MiniLM and base size with 128 tokens,
# eager, compiled, and compiled into CUDA graphs; the overhead of a step; the clocks and the power before and after.
set -eu
OUT=${1:?expected the folder for the figures}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$OUT"

card() {
    nvidia-smi --query-gpu=timestamp,name,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv >> "$OUT/card.csv"
}

step() { # NAME ARGUMENT...
    name=$1
    shift
    card
    "$PYTHON" benchmarks/step.py --autocast --rounds 5 --steps 30 --max-length 128 --json "$OUT/$name.json" "$@" |
        tee "$OUT/$name.txt"
    card
}

"$PYTHON" benchmarks/step.py --overhead --steps 30 --json "$OUT/overhead.json" | tee "$OUT/overhead.txt"
for model in minilm base; do
    step "$model-eager" --model "$model"
    step "$model-compiled" --model "$model" --compile default
    step "$model-graphs" --model "$model" --compile reduce-overhead
done

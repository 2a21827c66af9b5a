#!/usr/bin/env bash
# Train every teacher and student of docs/results/teachers.md, one after another, into runs/.
# What was stopped goes on where it stood; what is finished is not made again.
#
#   docs/train-teachers.sh                     the recipes as they are, for a CPU core each
#   SCALE=8 docs/train-teachers.sh             on a GPU: batches 8 times as large, an eighth of the iterations
#   TINY=1 OUT=/tmp/try docs/train-teachers.sh a trial of every step, minutes on a CPU
#   docs/train-teachers.sh shapes-teacher      these recipes only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY=PASSIVE
python=${PYTHON:-.venv/bin/python} out=${OUT:-runs} scale=${SCALE:-1}

# A larger batch has less noise: the learning rate grows with its square root (Malladi et al. 2022, for Adam).
scaled() {
  "$python" - "$1" "$scale" <<'END'
import sys
from distillers.jobs.recipe import Recipe
recipe, scale = Recipe.load(sys.argv[1]), int(sys.argv[2])
s = recipe.settings()
if scale > 1:
    print(f"train.iterations={s.iterations // scale} train.batch={s.batch * scale}", end=" ")
    print(f"train.learning_rate={s.learning_rate * scale**0.5:.3g} train.warmup={s.warmup // scale + 1}", end=" ")
    print(f"train.watch_every={s.watch_every // scale} train.sample_every={s.sample_every // scale}", end=" ")
    print("train.workers=8" if "pairs" in recipe.data["kind"] else "")  # a SAR crop takes a millisecond of a core
END
}

for name in ${@:-shapes-teacher shapes-consistency shapes-dmd2 sar-optical-128-teacher eurosat-teacher avatars-autoencoder}; do
  [ ! -f "$out/$name/fewstep.json" ] || { echo "$name: there"; continue; }
  read -ra changes <<< "$(scaled "$name")" || true
  if [ -n "${TINY:-}" ]; then
    changes=(train.iterations=4 train.batch=4 train.warmup=1 train.sample_every=2 train.samples=4 train.watch_every=4
             train.watch_samples=400 train.watch_steps=1)
  fi
  echo "$name: ${changes[*]:-as the recipe says}"
  "$python" -m distillers.cli distill "$name" ${changes[@]+"${changes[@]}"} --out "$out/$name"
done

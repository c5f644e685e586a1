#!/usr/bin/env bash
# All that needs a GPU, in pieces of nine minutes at most; each leaves $RESULTS/gpu/NAME.json.
#
#   benchmarks/gpu.sh                    the pieces that have no result yet
#   benchmarks/gpu.sh NAME 'fp32_*' ...  of these
#   benchmarks/gpu.sh --list [NAME...]   names, minutes on an H100 (estimates), commands
#   benchmarks/gpu.sh --smoke [NAME...]  one of each kind, tiny, on a CPU; keeps nothing
#
# Variables, relative to the repository: PYTHON (python), RESULTS (benchmarks/results), OUTPUT_DIR
# (outputs/gpu: logs, runs, weights), CIFAR10_ROOT. A piece that has a result is skipped: delete the
# file to measure again. A training cut off at nine minutes goes on from its last epoch when called
# again. ptq and qat start from the weights that their fp32 has left in OUTPUT_DIR. A piece that
# fails says why, and the next goes on. Status: 0 done, 1 a piece failed, 2 no piece of that name.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python}
RESULTS=${RESULTS:-benchmarks/results}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/gpu}

models=(resnet18 resnet18_imagenet_stem)
precisions=(32-true bf16-mixed) # 32-true: TF32 in convolutions, torch's default
seeds=(0 1 2)
schedules=(15 30 60) # epochs: how long to 94, 95, 96 %
amp=trainer.precision=bf16-mixed
few_bits=(recipe.qat.epochs=30 recipe.qat.freeze_batch_norm_epoch=27
  recipe.qat.freeze_observer_epoch=28)
device=(trainer=gpu)
step_size=()
race_size=(--steps 200)

mode=run
case ${1-} in
--list | --smoke)
  mode=${1#--}
  shift
  ;;
esac
wanted=("${@:-*}")
if [[ $mode == smoke ]]; then
  scratch=$(mktemp -d)
  RESULTS=$scratch/results
  OUTPUT_DIR=$scratch/outputs
  models=(resnet18_imagenet_stem)
  precisions=(bf16-mixed)
  seeds=(0)
  schedules=(15)
  device=(trainer=cpu data=digits trainer.limit_train_batches=3
    recipe.fp32.epochs=1 recipe.qat.epochs=1)
  few_bits=()
  step_size=(--steps 3 --warm-up 2 --batch-size 32 --modes eager default)
  race_size=(--smoke)
fi

pieces() {
  for model in "${models[@]}"; do
    for precision in "${precisions[@]}"; do
      piece "step_${model}_$precision" 5 \
        script training_step.py "${device[@]}" --model "$model" --precision "$precision" \
        "${step_size[@]}"
    done
  done
  for stage in fp32 qat; do
    piece "deterministic_$stage" 2 script deterministic.py "stage=$stage" "${device[@]}"
  done
  for model in "${models[@]}"; do
    piece "training_$model" 5 training --model "$model" "${race_size[@]}"
  done
  for seed in "${seeds[@]}"; do
    piece "fp32_seed$seed" 5 train recipe stage=fp32 "seed=$seed" data.val_size=0 "$amp"
    piece "ptq_seed$seed" 2 train recipe stage=ptq "seed=$seed" data.val_size=0
    piece "qat_seed$seed" 4 train recipe stage=qat "seed=$seed" data.val_size=0 "$amp"
  done
  for seed in "${seeds[@]}"; do # from the same weights as qat_seed*, longer: few bits need it
    for qconfig in w4a4_lsq w2a2_lsq; do
      piece "${qconfig}_seed$seed" 7 train recipe stage=qat "qconfig=$qconfig" "seed=$seed" \
        data.val_size=0 "${few_bits[@]}" "$amp"
    done
  done
  for seed in "${seeds[@]}"; do
    for stage in fp32 ptq qat; do
      piece "imagenet_stem_${stage}_seed$seed" 3 train recipe \
        "stage=$stage" model=resnet18_imagenet_stem "seed=$seed" data.val_size=0
    done
  done
  for epochs in "${schedules[@]}"; do
    for seed in "${seeds[@]}"; do
      piece "fp32_epochs${epochs}_seed$seed" 3 train "epochs$epochs" \
        stage=fp32 "recipe.fp32.epochs=$epochs" "seed=$seed" data.val_size=0 "$amp"
    done
  done
  for stage in fp32 qat; do # the origin's 200 and 10 epochs: fp32 may take two calls
    piece "seed_experiment_$stage" 9 train seed_experiment experiment=seed "stage=$stage"
  done
}

train() { # WHERE ITS WEIGHTS GO, OVERRIDES...
  local run=$OUTPUT_DIR/$name resume=()
  [[ -f $run/checkpoints/last.ckpt ]] && resume=("ckpt_path=$run/checkpoints/last.ckpt")
  limited train.py "hydra.run.dir=$run" "output_dir=$OUTPUT_DIR/$1" \
    "${@:2}" "${device[@]}" "${resume[@]}" &&
    cp "$run/metrics.json" "$result" &&
    rm -rf "$run/checkpoints" # or a later measurement would go on from them
}

script() { # FILE ARGUMENTS...
  limited "benchmarks/$1" --out "${result%.json}" "${@:2}"
}

training() { # ARGUMENTS...
  local folder=$OUTPUT_DIR/$name
  limited benchmarks/training.py --out "$folder" "$@" && cp "$folder"/training_*.json "$result"
}

limited() {
  timeout --kill-after=20 540 "$PYTHON" "$@" &
  wait $! # in the foreground, the trap below would have to wait for it
}

piece() { # NAME MINUTES COMMAND...
  name=$1
  result=$RESULTS/gpu/$name.json
  is_wanted || return
  if [[ $mode == list ]]; then
    printf '%-39s %s min  %s\n' "$name" "$2" "${*:3}"
  elif [[ -f $result ]]; then
    echo "$name: has its result"
  else
    run "${@:3}"
  fi
}

is_wanted() {
  local pattern status=1
  for pattern in "${wanted[@]}"; do
    # shellcheck disable=SC2053 # it may be a pattern
    [[ $name == $pattern ]] && found[$pattern]=yes && status=0
  done
  return $status
}

run() { # COMMAND...
  local log=$OUTPUT_DIR/$name.log start=$SECONDS status
  "$@" >"$log" 2>&1
  status=$?
  if [[ $status == 0 && -f $result ]]; then
    echo "$name: done in $((SECONDS - start)) s"
    return
  fi
  failed+=("$name")
  case $status in
  0) echo "$name: ended well but left no result; the end of $log:" ;;
  124 | 137) echo "$name: cut off after nine minutes; the end of $log:" ;;
  *) echo "$name: failed with status $status; the end of $log:" ;;
  esac
  tail -n 15 "$log" | sed 's/^/    /'
}

trap 'kill $(jobs -p); exit 130' INT TERM
declare -A found=()
failed=()
[[ $mode == list ]] || mkdir -p "$RESULTS/gpu" "$OUTPUT_DIR" || exit
pieces
for pattern in "${wanted[@]}"; do
  if [[ -z ${found[$pattern]-} ]]; then
    echo "no piece is called $pattern: see benchmarks/gpu.sh --list" >&2
    exit 2
  fi
done
[[ $mode == list ]] && exit
echo
"$PYTHON" benchmarks/tables_gpu.py "$RESULTS/gpu" || failed+=(tables_gpu.py)
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
[[ $mode != smoke ]] || rm -rf "$scratch"

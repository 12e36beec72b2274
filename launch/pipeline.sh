#!/usr/bin/env bash
# Every stage in order, from text to a Hugging Face folder that talks.
#
#   bash launch/pipeline.sh tiny                       the embedded corpus; minutes on two cores
#   bash launch/pipeline.sh small TEXT [VALIDATION]    real text; about 45 minutes on two cores
#
# TEXT holds <code>.txt.gz or <code>/... of each language; VALIDATION defaults to TEXT/../validation.
# Results go to $OUT (default runs/tiny, runs/small). Running it again continues where it stopped.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
size=${1:-}
case "$size" in
  tiny) ;;
  small)
    text=${2:-}
    validation=${3:-$text/../validation}
    for folder in "$text" "$validation"; do
      [ -d "$folder" ] || { echo "refused: '$folder' is not a folder of text by language" >&2; exit 65; }
    done
    text=$(realpath "$text") validation=$(realpath "$validation") ;;
  *) echo "usage: bash launch/pipeline.sh tiny | small TEXT [VALIDATION]" >&2; exit 65 ;;
esac
out=$(realpath -m "${OUT:-$here/runs/$size}")
cd "$here"
mkdir -p "$out"
# shellcheck source=launch/environment.sh
. launch/environment.sh "data,export,report,track"

stage() {  # stage VERB EXPERIMENT WORKDIR FIELDS...: prints what it runs, and runs it
  local verb=$1 experiment=$2 workdir=$3 fields=("${@:4}")
  printf '\n== %s\n' "$verb $experiment -> $workdir"
  python -m tiny_aya_jax "$verb" --config="experiments/$experiment" --workdir="$workdir" \
    "${fields[@]/#/--config.}"
}

tokenizer=$out/tokenizer.model
beside=(data.validation="$out/rows/validation" tokenizer="$tokenizer")
rows=(data.rows="$out/rows/train" "${beside[@]}")

if [ "$size" = tiny ]; then
  stage clean clean.py:tiny "$out/text"
  stage vocab vocab.py:tiny "$out" text="$out/text"
  stage pack pack.py:tiny "$out/rows" text="$out/text" tokenizer="$tokenizer"
  stage pack pack.py:tiny_instruct "$out/rows" tokenizer="$tokenizer"
  stage pack pack.py:tiny_validation "$out/rows" tokenizer="$tokenizer"
  stage pack pack.py:tiny_sft "$out/rows" tokenizer="$tokenizer"
  stage train pretrain.py:tiny "$out/pretrain" "${rows[@]}"
  stage train cooldown.py:tiny "$out/cooldown" init_from="$out/pretrain" "${rows[@]}"
  stage train sft.py:tiny_global "$out/sft" init_from="$out/cooldown" data.rows="$out/rows/sft" \
    "${beside[@]}"
  stage evaluate evaluate.py:tiny "$out/report" rows="$out/rows/validation" \
    tokenizer="$tokenizer" checkpoints="('$out/pretrain', '$out/cooldown', '$out/sft')" \
    baseline=pretrain tasks.cloze=embedded
  model=$out/sft prompt="Friday, Saturday, Sunday,"
else
  stage clean clean.py "$out/text" text="$text"
  stage vocab vocab.py:small "$out" text="$out/text" validation="$validation"
  stage pack pack.py:small "$out/rows" text="$out/text" tokenizer="$tokenizer"
  stage pack pack.py:small "$out/rows" text="$validation" stage=validation tokenizer="$tokenizer"
  stage train pretrain.py:small "$out/pretrain" "${rows[@]}"
  stage train cooldown.py:small "$out/cooldown" init_from="$out/pretrain" "${rows[@]}"
  stage evaluate evaluate.py:tiny "$out/report" rows="$out/rows/validation" \
    tokenizer="$tokenizer" checkpoints="('$out/pretrain', '$out/cooldown')" baseline=pretrain \
    baselines.train_text="$text" baselines.validation_text="$validation"
  model=$out/cooldown prompt="The"
fi
stage export export.py:tiny "$out" checkpoint="$model" tokenizer="$tokenizer" report="$out/report"
stage talk talk.py:tiny "$out" checkpoint="$model" tokenizer="$tokenizer" prompt="$prompt"

printf '\ncleaned text  %s\nvocabulary    %s\nreport        %s\ncheckpoint    %s\nHugging Face  %s\n' \
  "$out/text/clean.html" "$out/fairness.html" "$out/report/report.html" "$model/checkpoints" \
  "$out/huggingface"

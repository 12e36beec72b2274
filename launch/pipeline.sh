#!/usr/bin/env bash
# Every stage in order, from text to a Hugging Face folder that talks.
#
#   bash launch/pipeline.sh tiny                       the embedded corpus; minutes on two cores
#   bash launch/pipeline.sh small TEXT [VALIDATION [INSTRUCT PREFERENCE]]
#                                                      real text; about 45 minutes on two cores
#
# TEXT holds <code>.txt.gz or <code>/... of each language; VALIDATION defaults to TEXT/../validation.
# INSTRUCT and PREFERENCE hold conversations and pairs, <code>/... or *.jsonl with a field "lang".
# Results go to $OUT (default runs/tiny, runs/small). Running it again continues where it stopped.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
size=${1:-}
case "$size" in
  tiny) ;;
  small)
    text=${2:-}
    validation=${3:-$text/../validation} instruct=${4:-} preference=${5:-}
    for folder in "$text" "$validation" ${instruct:+"$instruct" "$preference"}; do
      [ -d "$folder" ] || { echo "refused: '$folder' is not a folder of text by language" >&2; exit 65; }
    done
    text=$(realpath "$text") validation=$(realpath "$validation")
    if [ -n "$instruct" ]; then
      instruct=$(realpath "$instruct") preference=$(realpath "$preference")
    fi ;;
  *) echo "usage: bash launch/pipeline.sh tiny | small TEXT [VALIDATION [INSTRUCT PREFERENCE]]" >&2; exit 65 ;;
esac
out=$(realpath -m "${OUT:-$here/runs/$size}")
cd "$here"
mkdir -p "$out"
# One cache for all stages: equal programs, such as those of the four SFTs, compile once.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compilation_cache}
# shellcheck source=launch/environment.sh
. launch/environment.sh "data,export,report,track"

stage() {  # stage VERB EXPERIMENT WORKDIR FIELDS...: prints what it runs, and runs it
  local verb=$1 experiment=$2 workdir=$3 fields=("${@:4}")
  printf '\n== %s\n' "$verb $experiment -> $workdir"
  python -m tiny_aya_jax "$verb" --config="experiments/$experiment" --workdir="$workdir" \
    "${fields[@]/#/--config.}"
}

posttrain() {  # from $out/cooldown and $out/rows/{sft,sft_held_out,pairs,pairs_held_out} to four models
  local sft=(init_from="$out/cooldown" data.rows="$out/rows/sft") part region
  stage train "sft.py:${size}_global" "$out/sft" "${sft[@]}" "${beside[@]}"
  for part in pairs pairs_held_out; do
    stage score "score.py:$size" "$out/rows" checkpoint="$out/sft" rows="$out/rows/$part" \
      stage="scored_$part" tokenizer="$tokenizer"
  done
  stage train "preference.py:$size" "$out/global" init_from="$out/sft" tokenizer="$tokenizer" \
    data.rows="$out/rows/scored_pairs" data.validation="$out/rows/scored_pairs_held_out"
  for region in earth fire water; do
    stage train "sft.py:${size}_$region" "$out/sft_$region" "${sft[@]}" tokenizer="$tokenizer"
    stage merge "merge.py:${size}_$region" "$out/$region" base="$out/cooldown" tokenizer="$tokenizer" \
      checkpoints="('$out/global', '$out/sft_$region')" search.rows="$out/rows/sft_held_out" \
      search.safety="$out/rows/pairs_held_out"
  done
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
  for part in sft sft_held_out pairs pairs_held_out; do
    stage pack "pack.py:tiny_$part" "$out/rows" tokenizer="$tokenizer"
  done
  stage train pretrain.py:tiny "$out/pretrain" "${rows[@]}"
  stage train cooldown.py:tiny "$out/cooldown" init_from="$out/pretrain" "${rows[@]}"
  stage sweep sweep.py:tiny "$out/sweep" rows="$out/rows/train" validation="$out/rows/validation" \
    tokenizer="$tokenizer"
  posttrain
  stage evaluate evaluate.py:tiny "$out/report" rows="$out/rows/validation" \
    tokenizer="$tokenizer" baseline=pretrain tasks.cloze=embedded limit=10 checkpoints="('$out/pretrain', \
    '$out/cooldown', '$out/sft', '$out/global', '$out/earth', '$out/fire', '$out/water')"
  model=$out/global prompt="Friday, Saturday, Sunday,"
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
  if [ -n "$instruct" ]; then
    for part in train held_out; do
      stage=${part/train/}; stage=${stage:+_$stage}
      stage pack pack.py:small "$out/rows" text="$instruct" packing=best_fit stage="sft$stage" \
        part="$part" held_out=0.05 tokenizer="$tokenizer"
      stage pack pack.py:small "$out/rows" text="$preference" packing=best_fit stage="pairs$stage" \
        part="$part" held_out=0.15 pairs=16 tokenizer="$tokenizer"
    done
    posttrain
    model=$out/global
  fi
fi
stage export export.py:tiny "$out" checkpoint="$model" tokenizer="$tokenizer" report="$out/report" \
  gguf.kinds="('Q8_0',)"
stage talk talk.py:tiny "$out" checkpoint="$model" tokenizer="$tokenizer" prompt="$prompt"

[ "$size" = small ] || printf '\nsweep         %s' "$out/sweep/sweep.html"
printf '\ncleaned text  %s\nvocabulary    %s\nreport        %s\ncheckpoint    %s\nHugging Face  %s\n' \
  "$out/text/clean.html" "$out/fairness.html" "$out/report/report.html" "$model/checkpoints" \
  "$out/huggingface"

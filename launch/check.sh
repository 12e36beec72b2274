#!/usr/bin/env bash
# What CI runs: installs, then every test, the tiny pipeline among them; prints the ten slowest.
#
#   bash launch/check.sh          in CI, under 35 minutes cold on two cores
#   bash launch/check.sh full     also a hundred kills and a thousand flipped bits, Python 3.12
#                                 ($PYTHON312), the full-size step compiled for TPUs, and what is
#                                 exported in other runtimes
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh "data,eval,export,report,sweep,track,test,parity"
if command -v shellcheck > /dev/null; then
  shellcheck launch/*.sh
else
  for script in launch/*.sh; do bash -n "$script"; done
fi
# Two files at a time; but one after the other where the seconds of what runs are part of the test.
python -m pytest tests --ignore=tests/faults --ignore=tests/test_pipeline.py -n 2 --dist loadfile --durations=10 -q
python -m pytest tests/test_pipeline.py tests/faults --durations=10 -q
if [ "${1:-}" = full ]; then
  # Other runtimes, each in an environment of its own: 3 GB, and half an hour to compile llama.cpp.
  peer() {  # NAME packages...: exports NAME_PYTHON
    rm -rf ".venv_$1" && python -m venv ".venv_$1"
    for package in "${@:2}"; do  # torch first, by exactly this version: any range pulls gigabytes of CUDA
      ".venv_$1/bin/pip" install --quiet --disable-pip-version-check "$package"
    done
    export "$1_PYTHON=$PWD/.venv_$1/bin/python"
  }
  peer TRANSFORMERS4 torch==2.13.0 transformers==4.57.6
  peer TRANSFORMERS5 torch==2.13.0 transformers==5.24.0
  peer MLX "mlx[cpu]==0.32.4" mlx-lm==0.32.2  # Linux: glibc 2.35 or newer
  peer LLAMA numpy llama-cpp-python==0.3.36
  python -m pytest tests/test_peers.py tests/test_llama.py tests/test_runtimes.py -q
  FAULTS=1 python -m pytest tests/faults tests/test_fp8.py tests/test_train.py tests/test_remap.py -q  # half an hour
  python -m pip install --quiet --disable-pip-version-check "jax[tpu]==$(python -c 'import jax; print(jax.__version__)')"
  # with libtpu, what compiles for a TPU is not skipped; an hour for the full-size step on ten slices
  BUDGETS=1 python -m pytest tests/test_hlo.py tests/test_proof.py tests/test_plan.py tests/test_budgets.py -q
  rm -rf .venv312 && "${PYTHON312:-python3.12}" -m venv .venv312
  .venv312/bin/pip install --quiet --disable-pip-version-check --editable ".[data,eval,export,report,sweep,track,test]"
  .venv312/bin/python -m pytest tests -q
fi

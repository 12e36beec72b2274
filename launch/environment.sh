# shellcheck shell=bash
# Sourced with the extras wanted: makes .venv if there is none, installs once per setup.py, puts it on PATH.
# PYTHON chooses the interpreter of a new .venv (3.11 or newer).
extras=$1
if ! [ -x .venv/bin/python ] || ! [ -e .venv/bin/activate ]; then  # written last
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "refused: $python is $("$python" --version 2>&1), expected Python 3.11 or newer; set PYTHON" >&2
    exit 65
  }
  "$python" -m venv --clear .venv
fi
# `activate` is not sourced: it names the place where the environment was made. So does the stamp: an
# environment that was moved installs again.
PATH=$PWD/.venv/bin:$PATH
export PATH
stamp=.venv/installed-$(printf '%s' "$extras:$PWD" | cksum | tr ' ' '-')
if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  echo "installing tiny_aya_jax[$extras]"
  case ",$extras," in
    # By exactly this version, and first: any range pulls gigabytes of CUDA.
    *,parity,*) .venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 ;;
  esac
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  touch "$stamp"
fi
# glibc: keep freed memory for the next step. XLA on CPU frees a step's temporaries and asks for them
# again: half a million page faults a step, 18% of its time. No effect on an accelerator's memory.
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776

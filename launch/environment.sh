# Sourced with the extras wanted: makes .venv if there is none, installs once per setup.py, activates.
# PYTHON chooses the interpreter of a new .venv (3.11 or newer).
extras=$1
[ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
# shellcheck disable=SC1091
. .venv/bin/activate
stamp=.venv/installed-$(printf '%s' "$extras" | tr ',' '-')
if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  echo "installing tiny_aya_jax[$extras]"
  case ",$extras," in
    # By exactly this version, and first: any range pulls gigabytes of CUDA.
    *,parity,*) python -m pip install --quiet --disable-pip-version-check torch==2.13.0 ;;
  esac
  python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  touch "$stamp"
fi

"""Puts the faults of $INJECT into process 0 of a pod: on PYTHONPATH, Python imports this first."""

import os
import pathlib
import sys

if os.environ.get("INJECT") and os.environ.get("JAX_PROCESS_ID") == "0":
  sys.path.append(str(pathlib.Path(__file__).parents[1]))
  import inject

  name, _, value = os.environ["INJECT"].partition("=")
  inject.FAULTS[name](value)

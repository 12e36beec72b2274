"""Prints the table of goals G1 to G10 on one GPU, ours and the named opponents in the same run.

  python launch/gpu_table.py [--rows G1 G2] [--minutes 28]    on the GPU: 12 layers, then all 36
  python launch/gpu_table.py --small                          tiny sizes, on a CPU too

Needs jax, flax, optax, and for G2 and G3 torch and transformers; neither grain nor ml_collections,
nor this package installed. Sides run in processes of their own, in turns, each with the largest
batch that fits. A row that fails or comes after the minutes says so, and the next begins. Goals are
for one H200: elsewhere there are figures, but no verdicts. Compiled programs are kept for the run,
or in JAX_COMPILATION_CACHE_DIR for the next.
"""

import argparse
import functools
import os
import pathlib
import runpy
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tiny_aya_jax import bench_pieces as pieces, bench_steps as steps, run

CONFIG = runpy.run_path(str(ROOT / "experiments" / "bench.py"))["FULL"]
SMALL = dict(
    model=CONFIG["model"] | dict(D=128, N=2, K=1, H=64, F=352, V=1024, window=64), T=128,
    loss_chunk=64,
)
# By periods: batches to try, largest first. Not tried is what cannot fit by arithmetic (fp32 logits
# are 8 GiB a sequence, three times; a layer keeps 0.4 to 0.8 GiB a sequence) and more than 65,536
# tokens, which fill every matmul.
BATCHES = {
    3: dict(ours=(8, 4, 2), fp8=(8, 4, 2), plain=(2, 1), transformers=(2, 1), tuned=(8, 4, 2, 1)),
    9: dict(ours=(4, 2, 1), fp8=(4, 2, 1), plain=(1,), transformers=(1,), tuned=(2, 1)),
}
# id: what, how its figure is written, must, target (performance.md 6); of the first two figures at
# least is good, of the others at most.
GOALS = dict(
    G1=("bf16 train step, MFU", "{:.1%}", 0.42, 0.50),
    G2=("tokens/s over transformers, torch.compile, SDPA", "{:.2f}x", 1.25, 1.5),
    G9=("peak memory, 36 layers, 1 sequence, remat attn", "{:.1f} GiB", 70, 62),
    G7=("windowed over full attention, time at T 8192", "{:.2f}", 0.90, 0.80),
    G8=("overhead of packing over the kernel without documents", "{:.1%}", 0.10, 0.05),
    G5=("fp8 over bf16, tokens/s", "{:.2f}x", 1.10, 1.20),
    G4=("tokens/s over plain Flax", "{:.2f}x", 1.5, 2.0),
    G6=("loss, recompute tile's time over ours", "{:.2f}x", 1.12, 1.20),
    G3=("tokens/s over hand-tuned torch", "{:.2f}x", 0.95, 1.0),
    G10=("first step, warm cache", "{:.0f} s", 60, 30),
)
AT_MOST = ("G7", "G8", "G9", "G10")
AGAIN = ("G1", "G2", "G9")  # with all layers


def main():
  asked = parse()
  deadline = time.monotonic() + 60 * asked.minutes
  about = steps.call(dict(piece="about", threads=0))
  fields = configured(asked, about)
  with tempfile.TemporaryDirectory(prefix="gpu_table_") as folder:
    fields["cache"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder)
    table(asked, fields, about, deadline)


def table(asked, fields, about, deadline):
  """Prints every row."""
  run.say(f"{about['device']}, jax {about['jax']}, python {sys.version.split()[0]}, "
          f"{fields['dtype']}, attention {fields['attention']}, T {fields['T']}, "
          f"V {fields['model']['V']}, {fields['turns']} turns of {fields['steps']} steps")
  for periods in asked.periods:
    fields = fields | dict(model=fields["model"] | dict(L=periods))
    fields["batches"] = (2,) if asked.small else BATCHES[3 if periods < 9 else 9]
    measured = rows(fields, deadline, asked)
    for name in GOALS if periods == asked.periods[0] else AGAIN:
      if name in asked.rows:
        run.say(row(name, measured[name], fields, about["device"]))


def parse():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--small", action="store_true", help="tiny sizes, once a side")
  parser.add_argument("--rows", nargs="+", default=list(GOALS), choices=GOALS, metavar="ROW")
  parser.add_argument("--layers", type=int, nargs="+",
                      help="all rows with so many (12, small 4), then with so many (36) G1, G2, G9")
  parser.add_argument("--minutes", type=float, default=28)
  parser.add_argument("--learn", type=int, default=0,
                      help="G5: also the loss after so many steps on learnable tokens, 300 say")
  asked = parser.parse_args()
  layers = asked.layers or ([4] if asked.small else [12, 36])
  if any(number < 4 or number % 4 for number in layers):
    parser.error(f"--layers {layers}: expected multiples of 4")
  asked.periods = [number // 4 for number in layers]
  return asked


def configured(asked, about):
  """The fields of a bench config, as a dict, for the device that `about` tells of."""
  gpu = about["platform"] == "gpu"
  if not (gpu or asked.small):
    raise run.Refused(f"the table needs a GPU, this is {about['device']}: --small runs anywhere")
  # The tolerance is of losses in bfloat16; those of the kernels' arrays are given in `rows`.
  fields = CONFIG | dict(threads=os.cpu_count(), turns=2, steps=10, tolerance=2e-3)
  if asked.small:
    fields |= SMALL | dict(turns=1, steps=2)
  return fields if gpu else fields | dict(attention="chunked", dtype="float32")


def rows(fields, deadline, asked):
  """{id: a function of nothing -> (figure, what else to say)}."""
  def call(**changes):
    return steps.call(fields, deadline, **changes)

  def batches(side):
    given = fields["batches"]
    return given[side] if isinstance(given, dict) else given

  def g1():
    result = call(side="ours", batches=batches("ours"))
    return steps.utilisation(fields, result)[1], steps.describe(fields, result)

  def ratio(ours, theirs, **changes):
    found = steps.alternate(fields | changes, (ours, theirs), f"  {ours} and {theirs}", deadline)
    speeds = [steps.speed(fields, found[side]) for side in (ours, theirs)]
    return speeds[0] / speeds[1], "; ".join(
        f"{side} {speed:,.0f} tokens/s, batch {found[side]['batch']}"
        for side, speed in zip((ours, theirs), speeds))

  def g5():
    figure, words = ratio("fp8", "ours", tolerance=pieces.FP8)
    if asked.learn:
      learnt = [call(side=side, batches=batches("ours")[-1:], learn=asked.learn, steps=1)["learnt"]
                for side in ("fp8", "ours")]
      words += (f"; loss after {asked.learn} steps {learnt[0]:.4f} and {learnt[1]:.4f}, "
                f"{abs(learnt[0] / learnt[1] - 1):.2%} apart, wanted at most 0.5%")
    return figure, words

  def g9():
    result = call(side="ours", batches=(1,), remat="attn", steps=2)
    return result["peak"] / steps.GIB, steps.describe(fields, result)

  @functools.cache
  def attention():
    return call(piece="attention", lengths=(fields["T"],), batch=1, turns=5, tolerance=3e-2)

  def g7():
    return pieces.windowed(attention(), fields["T"], fields["attention"]), "one document a row"

  def g8():
    return pieces.packing(attention(), fields["T"], fields["attention"]), "worst of full and window"

  def g6():
    T, against = fields["T"], ("ours", "recompute tile")
    found = call(piece="loss", lengths=(T,), batch=4, losses=against, turns=5, tolerance=3e-2)
    (ours, peak), (theirs, _) = (found[f"T {T}"][side] for side in against)
    peak /= steps.GIB
    return theirs / ours, f"4 x {T}; ours {1000 * ours:.4g} ms, peak {peak:.2f} GiB, wanted at most 6"

  def g10():
    found = pieces.start(steps.Fields(fields | dict(batches=batches("ours")[-1:])), deadline)
    return found["warm"], f"{found['cold']:.0f} s with nothing compiled"

  return dict(
      G1=g1, G2=lambda: ratio("ours", "transformers"), G3=lambda: ratio("ours", "tuned"),
      G4=lambda: ratio("ours", "plain"), G5=g5, G6=g6, G7=g7, G8=g8, G9=g9, G10=g10,
  )


def row(name, measure, fields, device):
  """One line of the table, whatever happens."""
  what, written, must, target = GOALS[name]
  layers = 4 * fields["model"]["L"]
  head = (f"{name}, {layers} layers | {what} | must {written.format(must)}, "
          f"target {written.format(target)} | ")
  try:
    figure, words = measure()
  except Exception as error:  # the next row may still be measured
    reason = error if isinstance(error, steps.Unmeasured) else f"{type(error).__name__}: {error}"
    return head + f"unmeasured: {' '.join(str(reason).split())} |"
  shown = written.format(figure) if figure is not None else "peak of this device unknown"
  return head + f"{shown} ({words}) | {verdict(name, figure, fields, device)}"


def verdict(name, figure, fields, device):
  _, _, must, target = GOALS[name]
  if device != "NVIDIA H200":
    return f"no verdict: goals are for one H200, this is {device}"
  if fields["T"] != CONFIG["T"] or name == "G9" and fields["model"]["L"] != CONFIG["model"]["L"]:
    return "no verdict: goals are for other sizes"
  sign = -1 if name in AT_MOST else 1
  if sign * figure >= sign * target:
    return "target met"
  return "must met, target missed" if sign * figure >= sign * must else "must missed"


if __name__ == "__main__":
  try:
    main()
  except run.Refused as refusal:
    print(f"refused: {refusal}", file=sys.stderr, flush=True)
    sys.exit(run.EXIT["refused"])

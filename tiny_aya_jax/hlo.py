"""What a compiled program moves and holds, read from its text: `compiled.as_text()`; no jax here.

The wire of a step is in bytes of whole tensors per chip: an all-gather counts its output, a
reduce-scatter its input, an all-reduce twice its tensor (it is both), an all-to-all its tensor, a
collective-permute its operand; each times the trip counts of the loops around it. It is not the
time on the links: a ring of n chips moves (n - 1)/n of it.

What was relied on, seen in texts of jaxlib 0.10.2 with libtpu 0.0.42.1 (v5e and v6e) and on CPU:

- Loops on CPU carry `known_trip_count`; on TPU they do not, so start, step and limit are read from
  the loop itself. A loop that cannot be read is an error, never a 1.
- `X-start(` with `X-done(` is one asynchronous collective; so is whatever an `async-start` calls.
- An asynchronous collective fusion of the TPU is a chain of fusions: `%async-collective-start`,
  compute fusions that call `%async_collective_fusion.N`, `%async-collective-done`. Each of their
  bodies repeats the same collective, with one `chain_id`; it is counted where the custom call
  "AsyncCollectiveStart" takes it, and skipped in the others: a count of the words is too high.
- A TPU collective with `async_collective_name` but no start and done was made synchronous again
  by the scheduler, and counts so.
- A reduce-scatter of the TPU along one axis of the chips is a `reduce-scatter`, or a fusion that
  calls `%all-reduce-scatter` (pad, all-reduce, slice; emitter "AllReduceScatterFusion", one phase)
  and counts as a reduce-scatter of the padded tensor (16 chips: 9% above the tensor). Over both
  axes at once it was an all-reduce (two phases) and a slice, and counts as that all-reduce.
"""

import collections
import math
import re
from typing import Any, NamedTuple

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute",
)  # fmt: skip
GIB = 2**30


class Collective(NamedTuple):
  """One collective instruction; `bytes` of the whole tensor, in one call."""

  name: str
  kind: str
  bytes: int
  calls: int  # a step: the product of the trip counts of the loops around it
  asynchronous: bool
  group: int  # chips that take part together
  shape: str  # of the whole tensor(s), 'bf16[4096,1024]'

  @property
  def wire(self):
    """Bytes of whole tensors per chip and step; an all-reduce is counted twice."""
    return self.bytes * self.calls * (2 if self.kind == "all-reduce" else 1)


class Array(NamedTuple):
  bytes: int
  dtype: str
  shape: tuple
  name: str  # of the first instruction that makes it


def collectives(text):
  """Every collective that a step executes, once per place: [Collective].

  Of a conditional the branch with the most wire counts. ValueError, with the name, on a loop
  without a readable trip count and on a collective in a form unknown here.
  """
  program = parse(text)
  refuse_loose_chains(program)
  return list(walk(program, Frame(program.entry), calls=1, asynchronous=False))


def wire(found):
  """Bytes of whole tensors that a chip moves in a step."""
  return sum(one.wire for one in found)


def asynchronous_share(found):
  """Part of the wire, 0 to 1, that computation can hide; 0 when nothing moves."""
  return wire(one for one in found if one.asynchronous) / max(wire(found), 1)


def table(found):
  """One line per kind: places, calls a step, GiB on the wire, and how much of it asynchronous."""
  lines = [f"{'':18} {'places':>6} {'calls':>7} {'wire GiB':>9} {'async':>6}"]
  groups = {kind: [one for one in found if one.kind == kind] for kind in KINDS}
  for kind, members in [*groups.items(), ("all", found)]:
    if members or kind == "all":
      lines.append(
        f"{kind:18} {len(members):6} {sum(one.calls for one in members):7} "
        f"{wire(members) / GIB:9.3f} {asynchronous_share(members):6.1%}"
      )
  return "\n".join(lines)


def largest_arrays(text, axis_size=None):
  """Arrays in memory, one per type and shape, largest first: [Array]; what fusions keep inside
  themselves is not in memory. axis_size: only arrays with a dimension of this size.
  """
  program, found = parse(text), {}
  inside = {
    callee
    for computation in program.computations.values()
    for instruction in computation.instructions.values()
    if instruction.op not in CONTROL
    for callee in callees(instruction)
  }
  for name, computation in program.computations.items():
    if name not in inside:
      for instruction in computation.instructions.values():
        for dtype, shape in arrays(instruction.shape):
          if axis_size is None or axis_size in shape:
            size = bytes_of(f"{dtype}[{','.join(map(str, shape))}]")
            found.setdefault((dtype, shape), Array(size, dtype, shape, instruction.name))
  return sorted(found.values(), reverse=True)


def custom_calls(text):
  """Counter {(target, kernel): places}; kernel is the name of a Pallas kernel, else ''.

  A kernel's name is the last part of op_name before "pallas_call": `name=` of the pallas_call, or
  the function around it.
  """
  counts = collections.Counter()
  for line in whole_lines(text):
    if " custom-call(" in line:  # the rest of a program, tens of MB, is not parsed for this
      instruction = parse_line(line)
      if instruction.op == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes).group(1)
        counts[target, kernel(instruction)] += 1
  return counts


def kernel(instruction):
  op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
  path = op_name.group(1).split("/") if op_name else [""]
  if "pallas_call" not in path[1:]:
    return ""
  before = path[len(path) - 2 - path[::-1].index("pallas_call")]
  return re.search(r"[^()]*(?=\)*$)", before).group(0)


# Reading the text.

CONTROL = ("while", "call", "conditional", "async-start", "async-update", "async-done")
CALLED = r"(?:calls|to_apply|body|condition|true_computation|false_computation)=(%[\w.\-]+)"
LISTED = r"(?:branch_computations|called_computations)=\{([^}]*)\}"


class Instruction(NamedTuple):
  name: str
  shape: str
  op: str
  operands: tuple  # names
  inside: str  # what stands between the parentheses
  attributes: str


class Computation(NamedTuple):
  instructions: dict  # name -> Instruction
  root: str


class Program(NamedTuple):
  computations: dict  # name -> Computation
  entry: str
  chips: int


def parse(text):
  """HLO text -> Program."""
  computations, entry, instructions = {}, None, None
  for line in whole_lines(text):
    header = re.match(r"(ENTRY )?(%[\w.\-]+) \(.*\{$", line)
    if header:
      name, root, instructions = header.group(2), None, {}
      entry = name if header.group(1) else entry
    elif line == "}":
      computations[name] = Computation(instructions, root)
      instructions = None
    elif instructions is not None and " = " in line:
      instruction = parse_line(line)
      instructions[instruction.name] = instruction
      root = instruction.name if line.lstrip().startswith("ROOT ") else root
  if entry is None:
    raise ValueError("not the text of an HLO module: no ENTRY computation")
  sizes = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
  return Program(computations, entry, math.prod(map(int, sizes)))


def whole_lines(text):
  """Lines, each with those that continue it: the metadata of a Pallas kernel is JSON over three."""
  line = ""
  for more in text.splitlines():
    if line.startswith("  ") and more and more[0] not in " %E" and more != "}":
      line += more
    else:
      yield line
      line = more
  yield line


def parse_line(line):
  """'  %name = shape op(operands), attributes' -> Instruction."""
  left, right = line.split(" = ", 1)
  end = closing(right, 0) if right[0] == "(" else right.index(" ")
  found = re.compile(r"\s*([\w\-]+)\(").match(right, end)
  if not found:
    raise ValueError(f"not an HLO instruction: {line[:200]}")
  stop = closing(right, found.end() - 1)
  inside = right[found.end() : stop - 1]
  return Instruction(
    left.split()[-1], right[:end], found.group(1), tuple(re.findall(r"%[\w.\-]+", inside)),
    inside, right[stop:],
  )  # fmt: skip


def closing(text, start):
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found.group() == "(" else -1
    if not depth:
      return found.end()
  raise ValueError(f"parentheses do not close: {text[:200]}")


def arrays(shape):
  """'(f32[2,3]{1,0}, u32[])' -> [('f32', (2, 3)), ('u32', ())], nested tuples flattened."""
  return [
    (dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
    for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape)
  ]


def bytes_of(shape):
  total = 0
  for dtype, sizes in arrays(shape):
    bits = 8 if dtype == "pred" else int((re.match(r"[a-z]+(\d+)", dtype) or [0, 0])[1])
    total += math.ceil(math.prod(sizes) * bits / 8)
  return total


def callees(instruction):
  single = re.findall(CALLED, instruction.attributes)
  listed = "".join(re.findall(LISTED, instruction.attributes))
  return single + re.findall(r"%[\w.\-]+", listed)


# Walking through it as it runs.


class Frame(NamedTuple):
  """A computation in its place: who calls it, and from where."""

  computation: str
  caller: Any = None  # Instruction
  outer: Any = None  # Frame of the caller


def walk(program, frame, calls, asynchronous):
  """Yields the collectives of a computation and of what it calls."""
  computation = program.computations[frame.computation]
  starts = chain_starts(computation)
  for instruction in computation.instructions.values():
    kind = instruction.op.removesuffix("-start")
    if kind in KINDS:
      if instruction.name in starts or not chain(instruction):
        hidden = asynchronous or instruction.name in starts or started_alone(instruction)
        scattered = kind == "all-reduce" and frame.caller and scatters(frame.caller)
        kind = "reduce-scatter" if scattered else kind
        yield measured(program, computation, instruction, kind, calls, hidden)
    elif instruction.op == "while":
      trips = trip_count(program, frame, instruction)
      for role, runs in (("condition", trips + 1), ("body", trips)):
        inner = Frame(called(instruction, role), instruction, frame)
        yield from walk(program, inner, calls * runs, asynchronous)
    elif instruction.op == "conditional":
      branches = [Frame(branch, instruction, frame) for branch in callees(instruction)]
      yield from max(
        (list(walk(program, branch, calls, asynchronous)) for branch in branches), key=wire
      )
    elif instruction.op in ("fusion", "call", "async-start", "custom-call"):
      hidden = asynchronous or instruction.op == "async-start"
      for callee in callees(instruction):
        yield from walk(program, Frame(callee, instruction, frame), calls, hidden)


def refuse_loose_chains(program):
  """ValueError on an asynchronous chain whose start or links are not found: a wrong count."""
  links, started = {}, set()
  for computation in program.computations.values():
    starts = chain_starts(computation)
    if starts and not any(chain(computation.instructions[name]) for name in starts):
      raise ValueError(f"{sorted(starts)}: a chain starts with no collective in sight")
    for instruction in computation.instructions.values():
      if link := chain(instruction):
        links[link] = instruction.name
        started |= {link} if instruction.name in starts else set()
  for link in links.keys() - started:
    raise ValueError(f"{links[link]}: a link of an asynchronous chain ({link}) without a start")


def chain_starts(computation):
  return {
    operand
    for instruction in computation.instructions.values()
    if 'custom_call_target="AsyncCollectiveStart"' in instruction.attributes
    for operand in instruction.operands
  }


def chain(instruction):
  """What the links of an asynchronous chain have in common; None outside a chain."""
  if "async_collective_fusion_config" not in instruction.attributes:
    return None
  found = re.search(r'chain_id="\w+"', instruction.attributes)
  return (found or re.search(r"channel_id=\d+", instruction.attributes)).group(0)


def scatters(fusion):
  return re.search(r"calls=%all-reduce-scatter|AllReduceScatterFusion", fusion.attributes)


def started_alone(instruction):
  # GPU texts keep start and done of a collective that runs synchronously, and say so.
  return instruction.op.endswith("-start") and '"is_sync":true' not in instruction.attributes


def called(instruction, role):
  return re.search(rf"\b{role}=(%[\w.\-]+)", instruction.attributes).group(1)


def measured(program, computation, instruction, kind, calls, asynchronous):
  """An instruction -> its Collective."""
  if "slice_sizes=" in instruction.attributes:
    raise ValueError(f"{instruction.name}: a collective of slices is not understood")
  if kind == "all-gather":
    whole = arrays(instruction.shape)
    if instruction.op.endswith("-start"):  # (operands, outputs)
      whole = whole[len(whole) // 2 :]
  else:
    operands = instruction.operands
    if kind == "ragged-all-to-all":  # the rest: outputs, offsets and sizes
      operands = operands[:1]
    whole = [one for name in operands for one in arrays(computation.instructions[name].shape)]
  shape = ", ".join(f"{dtype}[{','.join(map(str, sizes))}]" for dtype, sizes in whole)
  group = group_size(program, instruction)
  return Collective(instruction.name, kind, bytes_of(shape), calls, asynchronous, group, shape)


def group_size(program, instruction):
  """Chips in the first group, of the four ways to write it; a permutation's longest ring."""
  attributes = instruction.attributes
  pairs = dict(re.findall(r"[{,]\{(\d+),(\d+)\}", attributes.partition("source_target_pairs=")[2]))
  if pairs:
    return max(len(ring(pairs, source)) for source in pairs)
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return len(found.group(1).split(","))
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
    return int(found.group(1))
  if found := re.search(r"replica_groups=mesh\[([^]]*)\].*? \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"('\w+')=(\d+)", found.group(1)))
    axes = [axis.strip() for axis in found.group(2).split(",")]
    if set(axes) <= set(sizes):
      return math.prod(int(sizes[axis]) for axis in axes)
  if "replica_groups={}" in attributes:
    return program.chips
  raise ValueError(f"{instruction.name}: its groups are not understood: {attributes[:200]}")


def ring(pairs, source):
  chips = [source]
  while pairs.get(chips[-1], source) not in chips:
    chips.append(pairs[chips[-1]])
  return chips


# Trip counts: a loop's state is a tuple; a scalar in it is `element k plus c`, or a constant.


def trip_count(program, frame, loop):
  """Times that the body of a while runs."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(known.group(1))
  condition, body = (Frame(called(loop, role)) for role in ("condition", "body"))
  found = comparison(program, condition, program.computations[condition.computation].root)
  if found:
    direction, left, right = found
    for direction, (index, shift), limit in (
      (direction, left, right), (FLIPPED[direction], right, left),
    ):  # fmt: skip
      root = program.computations[body.computation].root
      after = index is not None and element(program, body, root, index)
      if after and after[0] == index and after[1]:
        start = element(program, frame, loop.operands[0], index)
        limit = settle(program, frame, loop, limit)
        if start and limit is not None:
          return times(loop, direction, start[1] + shift, limit, after[1])
  raise ValueError(
    f"{loop.name}: trip count unknown; no known_trip_count, and start, step or limit of "
    f"{condition.computation} are not constants"
  )


FLIPPED = dict(LT="GT", GT="LT", LE="GE", GE="LE", NE="NE", EQ="EQ")


def times(loop, direction, start, limit, step):
  if direction in ("LE", "GE"):
    limit += 1 if direction == "LE" else -1
  upward = step > 0
  runs = -((start - limit) // step)  # the ceiling of (limit - start) / step
  if direction == "NE" and (limit - start) % step == 0 and runs >= 0:
    return runs
  if direction in (("LT", "LE") if upward else ("GT", "GE")):
    return max(0, runs)
  raise ValueError(f"{loop.name}: from {start} by {step} while {direction} {limit} is no count")


def comparison(program, frame, name):
  """(direction, left, right) of a condition's root, looked up through fusions; None if another."""
  instruction = program.computations[frame.computation].instructions[name]
  if instruction.op in ("fusion", "call"):
    inner = Frame(callees(instruction)[0], instruction, frame)
    return comparison(program, inner, program.computations[inner.computation].root)
  if instruction.op != "compare":
    return None
  sides = [scalar(program, frame, operand) for operand in instruction.operands]
  direction = re.search(r"direction=(\w\w)", instruction.attributes).group(1)
  return (direction, *sides) if all(sides) else None


def settle(program, frame, loop, value):
  """(k, c) in a loop that never changes element k -> the number; None if it is not one."""
  index, shift = value
  if index is None:
    return shift
  before = unchanged(program, frame, loop, index)
  return before[1] + shift if before else None


def unchanged(program, frame, loop, index):
  """The value before the loop of an element that its body passes on; None if it does not."""
  body = Frame(called(loop, "body"))
  if element(program, body, program.computations[body.computation].root, index) == (index, 0):
    return element(program, frame, loop.operands[0], index)
  return None


SAME = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier")


def scalar(program, frame, name):
  """An integer as (k, c): element k of the loop's state, plus c; k None: the constant c.

  None if it is neither. A frame without caller is a loop's own computation, its state a symbol.
  """
  instruction = program.computations[frame.computation].instructions[name]
  op, operands = instruction.op, instruction.operands
  if op == "constant" and re.fullmatch(r"-?\d+", instruction.inside):
    return None, int(instruction.inside)
  if op in SAME:
    return scalar(program, frame, operands[0])
  if op in ("add", "subtract"):
    left, right = (scalar(program, frame, operand) for operand in operands)
    if left and right and right[0] is None:
      return left[0], left[1] + (right[1] if op == "add" else -right[1])
    if left and right and left[0] is None and op == "add":
      return right[0], left[1] + right[1]
  if op == "get-tuple-element":
    return element(program, frame, operands[0], tuple_index(instruction))
  if op == "parameter" and frame.caller and frame.caller.op in ("fusion", "call"):
    return scalar(program, frame.outer, frame.caller.operands[int(instruction.inside)])
  if op in ("fusion", "call"):
    inner = Frame(callees(instruction)[0], instruction, frame)
    return scalar(program, inner, program.computations[inner.computation].root)
  return None


def element(program, frame, name, index):
  """Element `index` of a tuple, as `scalar` gives it."""
  instruction = program.computations[frame.computation].instructions[name]
  op, operands = instruction.op, instruction.operands
  if op == "tuple":
    return scalar(program, frame, operands[index])
  if op in SAME:
    return element(program, frame, operands[0], index)
  if op == "while":
    return unchanged(program, frame, instruction, index)
  if op == "parameter" and frame.caller is None:
    return (index, 0) if frame.computation != program.entry else None
  if op == "parameter" and frame.caller.op == "while":
    return unchanged(program, frame.outer, frame.caller, index)
  if op == "parameter" and frame.caller.op in ("fusion", "call"):
    return element(program, frame.outer, frame.caller.operands[int(instruction.inside)], index)
  if op in ("fusion", "call"):
    inner = Frame(callees(instruction)[0], instruction, frame)
    return element(program, inner, program.computations[inner.computation].root, index)
  return None


def tuple_index(instruction):
  return int(re.search(r"\bindex=(\d+)", instruction.attributes).group(1))

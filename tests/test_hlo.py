"""Wire, trip counts and arrays read from HLO text: two layers by hand, snippets, one real TPU text."""

import collections
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from tiny_aya_jax import hlo, plan

L, M, D, F, ROWS = 2, 3, 32, 48, 4
WEIGHT = D * F * 4  # bytes of one gathered matrix, fp32


@pytest.fixture(scope="module")
def text():
  """Two layers in a scan, three microbatches in a scan around it, on 8 devices, each recomputed."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec as P

  def layer(x_BD, weights):
    up_DF = jax.lax.all_gather(weights[0], "fsdp", axis=0, tiled=True)
    down_FD = jax.lax.all_gather(weights[1], "fsdp", axis=1, tiled=True)
    return x_BD + jnp.sin(x_BD @ up_DF) @ down_FD, None

  def step(up_LDF, down_LFD, x_MBD):
    def micro(total, x_BD):
      x_BD = jax.lax.ppermute(x_BD, "fsdp", [(i, (i + 1) % 8) for i in range(8)])
      gradient = jax.grad(lambda w: jax.lax.scan(jax.checkpoint(layer), x_BD, w)[0].sum())
      return jax.tree.map(jnp.add, total, gradient((up_LDF, down_LFD))), None

    zeros = jax.tree.map(jnp.zeros_like, (up_LDF, down_LFD))
    total, _ = jax.lax.scan(micro, zeros, x_MBD)
    norm = jax.lax.psum(jnp.vdot(total[0], total[0]), "fsdp")
    return total, norm, jax.lax.all_to_all(x_MBD[0], "fsdp", 1, 0, tiled=True)

  mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))
  specs = (P(None, "fsdp"), P(None, None, "fsdp"))
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(*specs, P(None, "fsdp")), out_specs=(specs, P(), P("fsdp")),
    check_vma=False,
  )  # fmt: skip
  shapes = ((L, D, F), (L, F, D), (M, 8 * ROWS, D))
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(sharded).lower(*arguments).compile().as_text()


def test_two_layers_move_the_bytes_computed_by_hand(text):
  found = hlo.collectives(text)
  moved = collections.Counter()
  for one in found:
    moved[one.kind] += one.wire
    assert one.group == 8 and not one.asynchronous, one
  assert moved == {
    "all-gather": 2 * WEIGHT * L * M * 2,  # up and down, forward and recomputed
    "reduce-scatter": 2 * WEIGHT * L * M,  # their gradients
    "all-reduce": 2 * 4,  # one fp32 number, once after the loops
    "collective-permute": ROWS * D * 4 * M,
    "all-to-all": ROWS * D * 4,
  }
  assert hlo.wire(found) == sum(moved.values())
  assert hlo.asynchronous_share(found) == 0


def test_trip_counts_read_from_the_loops_equal_the_annotated_ones(text):
  assert text.count('"known_trip_count"') >= 3
  assert hlo.collectives(text.replace("known_trip_count", "unknown")) == hlo.collectives(text)


def test_the_table_has_a_line_for_every_kind_and_for_all(text):
  lines = hlo.table(hlo.collectives(text)).splitlines()
  assert [line.split()[0] for line in lines[1:]] == [
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "all",
  ]  # fmt: skip


def module(entry, others=""):
  """A module whose ENTRY has these lines, after other computations."""
  return f"""HloModule m, is_scheduled=true, num_partitions=16

{others}
ENTRY %main (p: f32[4,8]) -> f32[4,8] {{
  %p = f32[4,8]{{1,0:T(8,128)}} parameter(0)
{entry}
}}
"""


def loop(body, limit="constant(3)", step="constant(1)", direction="LT", name="body"):
  """A loop's two computations, as a TPU text has them: no trip count anywhere."""
  state = "(s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)})"
  return f"""
%{name} (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %state = {state} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %x = f32[4,8]{{1,0:T(8,128)}} get-tuple-element(%state), index=1
  %one = s32[]{{:T(128)}} {step}
  %next = s32[]{{:T(128)}} add(%i, %one)
{body}
  ROOT %out = {state} tuple(%next, %y)
}}

%{name}_condition (state.1: (s32[], f32[4,8])) -> pred[] {{
  %limit = s32[]{{:T(128)}} {limit}
  %state.1 = {state} parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  ROOT %go = pred[]{{:T(512)}} compare(%i.1, %limit), direction={direction}
}}
"""


def run_loop(name="body", start="constant(0)", x="%p", ends="ROOT ", attributes=""):
  """Lines that run such a loop."""
  state = "(s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)})"
  return f"""  %start.{name} = s32[]{{:T(128)}} {start}
  %in.{name} = {state} tuple(%start.{name}, {x})
  {ends}%run.{name} = {state} while(%in.{name}), condition=%{name}_condition, body=%{name}{attributes}"""


REDUCE = (
  "  %y = f32[4,8]{1,0:T(8,128)S(1)} all-reduce(%x), channel_id=1,"
  " replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}, to_apply=%add"
)


@pytest.mark.parametrize(
  "runs, start, limit, step, direction",
  [
    (3, 0, 3, 1, "LT"), (4, 0, 3, 1, "LE"), (2, 1, 6, 3, "LT"), (3, 0, 7, 3, "LT"),
    (5, 5, 0, -1, "GT"), (6, 5, 0, -1, "GE"), (4, 0, 8, 2, "NE"), (0, 9, 3, 1, "LT"),
  ],
)  # fmt: skip
def test_a_loop_without_annotation_is_counted_by_start_step_and_limit(
  runs, start, limit, step, direction
):
  others = loop(REDUCE, f"constant({limit})", f"constant({step})", direction)
  (one,) = hlo.collectives(module(run_loop(start=f"constant({start})"), others))
  assert (one.calls, one.group, one.bytes) == (runs, 8, 4 * 8 * 4)
  assert one.wire == 2 * 128 * runs


def test_nested_loops_multiply_with_and_without_annotation():
  inner = loop(REDUCE, "constant(5)", name="inner")
  body = run_loop("inner", x="%x", ends="")
  body += "\n  %y = f32[4,8]{1,0} get-tuple-element(%run.inner), index=1"
  known = ', backend_config={"known_trip_count":{"n":"9"}}'
  (one,) = hlo.collectives(module(run_loop(), inner + loop(body)))
  assert one.calls == 3 * 5
  (one,) = hlo.collectives(module(run_loop(attributes=known), inner + loop(body)))
  assert one.calls == 9 * 5


@pytest.mark.parametrize(
  "others, start",
  [
    (loop(REDUCE, limit="parameter(1)"), "constant(0)"),
    (loop(REDUCE, step="parameter(1)"), "constant(0)"),
    (loop(REDUCE), "infeed()"),
    (loop(REDUCE, step="constant(0)"), "constant(0)"),
    (loop(REDUCE).replace("add(%i, %one)", "add(%one, %one)"), "constant(0)"),
    (loop(REDUCE, direction="GT"), "constant(9)"),
  ],
)
def test_a_loop_that_cannot_be_counted_is_refused_by_name(others, start):
  with pytest.raises(ValueError, match="%run.body"):
    hlo.collectives(module(run_loop(start=start), others))


LINK = (
  "all-gather(%q), channel_id=14, replica_groups={{0,1,2,3}}, dimensions={0}, "
  'frontend_attributes={chain_id="0"}, backend_config={"flag_configs":[],'
  '"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}'
)
CHAIN = f"""
%start_fusion (q: f32[4,8]) -> (f32[4,8], f32[16,8], u32[]) {{
  %q = f32[4,8]{{1,0:T(8,128)}} parameter(0)
  %all-gather.1 = f32[16,8]{{1,0:T(8,128)}} {LINK}
  ROOT %c = (f32[4,8]{{1,0}}, f32[16,8]{{1,0}}, u32[]{{:S(2)}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (q: f32[4,8]) -> f32[16,8] {{
  %q = f32[4,8]{{1,0:T(8,128)}} parameter(0)
  ROOT %all-gather.2 = f32[16,8]{{1,0:T(8,128)}} {LINK}
}}

%done_fusion (q: f32[4,8]) -> f32[16,8] {{
  %q = f32[4,8]{{1,0:T(8,128)}} parameter(0)
  %all-gather.3 = f32[16,8]{{1,0:T(8,128)}} {LINK}
  ROOT %c.1 = f32[16,8]{{1,0}} custom-call(%q, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}
"""
CHAINED = """
  %async-collective-start = (f32[4,8]{1,0}, f32[16,8]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%start_fusion
  %fusion.1 = f32[16,8]{1,0} fusion(%p), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %async-collective-done = f32[16,8]{1,0} fusion(%p), kind=kCustom, calls=%done_fusion"""


def test_an_asynchronous_chain_of_fusions_is_one_collective():
  (one,) = hlo.collectives(module(CHAINED, CHAIN))
  assert one == ("%all-gather.1", "all-gather", 16 * 8 * 4, 1, True, 4, "f32[16,8]")
  without_names = CHAIN.replace('frontend_attributes={chain_id="0"}, ', "")
  assert hlo.collectives(module(CHAINED, without_names)) == [one]


def test_links_of_a_chain_that_nothing_starts_are_refused():
  first, rest = CHAIN.split("%async_collective_fusion", 1)
  other_chain = first + "%async_collective_fusion" + rest.replace('chain_id="0"', 'chain_id="1"')
  for loose in (CHAIN.replace("AsyncCollectiveStart", "Another"), other_chain):
    with pytest.raises(ValueError, match="without a start"):
      hlo.collectives(module(CHAINED, loose))


def test_a_start_of_something_that_is_no_collective_is_refused():
  hidden = CHAIN.replace("custom-call(%all-gather.1)", "custom-call(%q)")
  with pytest.raises(ValueError, match="starts with no collective"):
    hlo.collectives(module(CHAINED, hidden))


def test_start_and_done_are_one_asynchronous_collective():
  found = hlo.collectives(module("""
  %g = ((f32[4,8]{1,0}, bf16[2]{0}), /*index=1*/(f32[16,8]{1,0:T(8,128)}, bf16[8]{0})) all-gather-start(%p, %b), replica_groups=[4,4]<=[16], dimensions={0}
  %h = (f32[16,8]{1,0}, bf16[8]{0}) all-gather-done(%g)
  %c = (f32[4,8]{1,0:T(8,128)}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=1, source_target_pairs={{3,3},{0,1},{1,2},{2,0}}
  %d = f32[4,8]{1,0} collective-permute-done(%c)
  %r = f32[4,8]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  ROOT %s = f32[4,8]{1,0} all-reduce-done(%r)"""))  # fmt: skip
  assert [(one.kind, one.bytes, one.asynchronous, one.group) for one in found] == [
    ("all-gather", 16 * 8 * 4 + 8 * 2, True, 4),
    ("collective-permute", 128, True, 3),
    ("all-reduce", 128, False, 16),
  ]
  assert hlo.asynchronous_share(found) == (528 + 128) / (528 + 128 + 256)


def test_what_an_async_start_calls_is_asynchronous_and_counted_once():
  wrapped = """
%wrapped (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %a = f32[1,8]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
"""
  (one,) = hlo.collectives(module("""
  %b = ((f32[4,8]{1,0}), f32[1,8]{1,0}, u32[]) async-start(%p), calls=%wrapped
  ROOT %c = f32[1,8]{1,0} async-done(%b), calls=%wrapped""", wrapped))  # fmt: skip
  assert one[1:6] == ("reduce-scatter", 128, 1, True, 4)


def test_the_fused_reduce_scatter_of_a_tpu_is_not_an_all_reduce():
  fused = """
%all-reduce-scatter.2 (input: f32[4,8]) -> f32[2,8] {
  %input = f32[4,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[8,8]{1,0} pad(%input, %zero), padding=0_4x0_0
  %all-reduce.1 = f32[8,8]{1,0} all-reduce(%pad), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[2,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,8}
}
"""
  (one,) = hlo.collectives(module(
    "  ROOT %f = f32[2,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2", fused
  ))  # fmt: skip
  assert (one.kind, one.wire, one.group) == ("reduce-scatter", 8 * 8 * 4, 4)


def test_a_ragged_all_to_all_counts_its_tensor_only():
  (one,) = hlo.collectives(module(
    "  ROOT %f = f32[4,8]{1,0} ragged-all-to-all(%p, %p, %p), replica_groups={{0,1}}"
  ))  # fmt: skip
  assert (one.kind, one.bytes) == ("ragged-all-to-all", 128)


def test_a_limit_carried_in_the_state_counts_only_if_the_body_leaves_it_alone():
  others = loop(REDUCE, limit="get-tuple-element(%state.1), index=2")
  others = others.replace("tuple(%next, %y)", "tuple(%next, %y, %kept)")
  entry = run_loop().replace("tuple(%start.body, %p)", "tuple(%start.body, %p, %seven)")
  entry = "  %seven = s32[] constant(7)\n" + entry
  kept = "\n  %kept = s32[] get-tuple-element(%state), index=2\n  ROOT %out"
  (one,) = hlo.collectives(module(entry, others.replace("\n  ROOT %out", kept)))
  assert one.calls == 7
  with pytest.raises(ValueError, match="%run.body"):
    hlo.collectives(module(entry, others.replace("\n  ROOT %out", kept.replace("=2", "=0"))))


def test_of_a_conditional_the_branch_with_the_most_wire_counts():
  branch = "\n%{0} (q: f32[4,8]) -> f32[4,8] {{\n  %x = f32[4,8]{{1,0}} parameter(0)\n{1}\n}}\n"
  others = branch.format("idle", "") + branch.format("busy", REDUCE)
  (one,) = hlo.collectives(module(
    "  ROOT %c = f32[4,8]{1,0} conditional(%p, %p), branch_computations={%idle, %busy}", others
  ))  # fmt: skip
  assert one.wire == 256


def test_the_largest_arrays_are_those_in_memory():
  fused = """
%fused (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  %mask = pred[4096,4096]{1,0} broadcast(%q), dimensions={}
  ROOT %t = f32[4,8]{1,0} negate(%q)
}
"""
  found = hlo.largest_arrays(module("""
  %e = (bf16[262144,64]{1,0:T(8,128)(2,1)S(1)}, pred[7]{0}, s4[3]{0}) custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f = f32[4,8]{1,0} fusion(%p), kind=kLoop, calls=%fused""", fused))  # fmt: skip
  assert [(one.bytes, one.dtype, one.shape) for one in found] == [
    (262144 * 64 * 2, "bf16", (262144, 64)), (128, "f32", (4, 8)), (7, "pred", (7,)),
    (2, "s4", (3,)),
  ]  # fmt: skip
  (one,) = hlo.largest_arrays(module("  ROOT %f = f32[9]{0} copy(%p)"), axis_size=9)
  assert one.name == "%f"


def test_custom_calls_are_counted_by_target_and_kernel():
  call = "  %{0} = f32[4,8]{{1,0}} custom-call(%p), custom_call_target={1}, metadata={{op_name={2}}}"
  entry = "\n".join((
    call.format("k.1", '"tpu_custom_call"', '"jit(step)/while/body/splash_fwd/pallas_call"'),
    call.format("k.2", '"tpu_custom_call"', '"jit(step)/vmap(splash_fwd)/pallas_call"'),
    call.format("k.3", '"tpu_custom_call"', '"jit(f)/pallas_call"'),
    call.format("k.4", '"AllocateBuffer"', '"jit(f)/dot_general"'),
  ))  # fmt: skip
  assert hlo.custom_calls(module(entry)) == {
    ("tpu_custom_call", "splash_fwd"): 2, ("tpu_custom_call", "f"): 1, ("AllocateBuffer", ""): 1,
  }  # fmt: skip


def test_an_instruction_whose_metadata_is_json_over_lines_is_one_instruction():
  entry = (
    '  %k.1 = f32[4,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", '
    'frontend_attributes={kernel_metadata={\n"block": "{128}"\n}}, '
    'metadata={op_name="jit(f)/splash_fwd/pallas_call"}\n'
    "  ROOT %g.1 = f32[64,8]{1,0} all-gather(%k.1), replica_groups={{0,1}}, dimensions={0}"
  )
  (one,) = hlo.collectives(module(entry))
  assert one.bytes == 64 * 8 * 4
  assert hlo.custom_calls(module(entry)) == {("tpu_custom_call", "splash_fwd"): 1}


TPU = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc("v5e:4x4", "tpu", chips_per_host_bounds=(2, 2, 1)).devices
mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

def step(w_LDD, x_MBD):
  def loss(w_LDD, x_BD):
    layer = jax.checkpoint(lambda x_BD, w_DD: (jnp.sin(x_BD @ w_DD), None))
    return jax.lax.scan(layer, x_BD, w_LDD)[0].astype(jnp.float32).sum()
  def micro(total, x_BD):
    return total + jax.grad(loss)(w_LDD, x_BD), None
  return jax.lax.scan(micro, jnp.zeros_like(w_LDD), x_MBD)[0]

sharded = lambda shape, *spec: jax.ShapeDtypeStruct(
  shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
arguments = sharded((2, 1024, 1024), None, "fsdp"), sharded((3, 1024, 1024), None, "fsdp")
print(jax.jit(step).lower(*arguments).compile().as_text())
"""


def test_a_tpu_program_gathers_its_layers_once_a_pass():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  environment.update(plan.COMPILE_ONLY)
  done = subprocess.run(
    [sys.executable, "-c", TPU], env=environment, capture_output=True, text=True, timeout=300,
    cwd=pathlib.Path(__file__).parents[1],
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  gathers = [one for one in hlo.collectives(done.stdout) if one.kind == "all-gather"]
  assert "known_trip_count" not in done.stdout
  assert {one.calls for one in gathers} == {2 * 3} and {one.group for one in gathers} == {16}
  assert hlo.wire(gathers) == 2 * (2 * 3) * 1024 * 1024 * 2  # forward and recomputed, bfloat16

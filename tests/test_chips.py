"""chips: names of TPU slices, read or refused."""

import types

import pytest

from tiny_aya_jax import chips, run


def test_a_slice_knows_its_size_and_which_axes_are_rings():
  assert [chips.parse(name).size for name in ("v5e:4x4", "v5p:2x2x4", "v6e:16x16")] == [16, 16, 256]
  assert chips.parse("v6e:8x16").wrap == (False, True)
  assert chips.parse("v5p:4x4x8").wrap == (True,) * 3 and chips.parse("v5p:2x4x4").wrap == (False,) * 3


def test_several_slices_are_one_topology():
  two = chips.parse("2xv5e:4x4")
  assert (two.slices, two.shape, two.size, two.chip) == (2, (4, 4), 32, chips.CHIPS["v5e"])
  assert chips.parse("v5e:4x4").slices == 1 and two.wrap == chips.parse("v5e:4x4").wrap


@pytest.mark.parametrize("name", ["0xv5e:4x4", "xv5e:4x4", "2xv5e", "2x:4x4", "v5e:4\n", "v5x:4x4", "v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v6e:0x4", "v6e:axb"])
def test_anything_else_is_refused_with_what_would_do(name):
  with pytest.raises(run.Refused, match="did you mean|for example|expected one of"):
    chips.parse(name)


def device(kind):
  return types.SimpleNamespace(device_kind=kind)


def test_what_xla_is_told_is_found_by_the_kind_of_device():
  for name, chip in chips.CHIPS.items():
    for kind in chip.kinds:
      assert chips.compiler_options(kind) == chips.COMPILER_OPTIONS[name]
  assert chips.compiler_options("cpu") == {}


def test_a_run_on_other_devices_than_it_names_is_refused():
  chips.refuse_other(None, [device("cpu")])
  chips.refuse_other("v5e:2x2", [device("TPU v5 lite")] * 4)
  for devices in ([device("cpu")] * 4, [device("TPU v5 lite")] * 8):
    with pytest.raises(run.Refused, match="v5e:2x2, 4 chips"):
      chips.refuse_other("v5e:2x2", devices)

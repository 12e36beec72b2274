"""chips: names of TPU slices, read or refused."""

import pytest

from tiny_aya_jax import chips, run


def test_a_slice_knows_its_size_and_which_axes_are_rings():
  assert [chips.parse(name).size for name in ("v5e:4x4", "v5p:2x2x4", "v6e:16x16")] == [16, 16, 256]
  assert chips.parse("v6e:8x16").wrap == (False, True)
  assert chips.parse("v5p:4x4x8").wrap == (True,) * 3 and chips.parse("v5p:2x4x4").wrap == (False,) * 3


@pytest.mark.parametrize("name", ["v5x:4x4", "v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v6e:0x4", "v6e:axb"])
def test_anything_else_is_refused_with_what_would_do(name):
  with pytest.raises(run.Refused, match="did you mean|for example|expected one of"):
    chips.parse(name)

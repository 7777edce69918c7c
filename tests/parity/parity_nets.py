"""Our nets against the public PyTorch modules, run side by side; not collected by a plain `pytest`:

pip install 'jdiff[parity]'; JDIFF_OFFICIAL=folder/of/clones pytest -n 0 tests/parity/parity_nets.py
"""

import re

import numpy as np
import pytest
from flax import nnx
from test_convert import abstract, output

from jdiff import convert, nets
from parity import official


@pytest.mark.parametrize("name", official.CASES)
@pytest.mark.filterwarnings("ignore")
def test_parity(name):
    """Max relative error 1e-5 in float32, with weights that both sides draw from one seed."""
    case = official.CASES[name]
    try:
        shapes, want = official.run(case)
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(f"{name}: {error}")
    net, _ = convert.to_ours(official.drawn(case, shapes), case.layout, abstract(name))
    error = np.abs(output(name, net) - want).max() / np.abs(want).max()
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("name", official.PUBLISHED)
@pytest.mark.filterwarnings("ignore")
def test_presets_have_the_published_names_and_shapes(name):
    """The public module at its published size: every name, and every array's shape, and nothing else."""
    layout, size, channels, options, make = official.PUBLISHED[name]
    try:
        theirs = official.shapes_of(make)
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(f"{name}: {error}")
    net = nnx.eval_shape(lambda: nets.build(name.split(" (")[0], size, channels, rngs=nnx.Rngs(0), **options))
    ours = {"/".join(map(str, p)): v.shape for p, v in nnx.to_flat_state(nnx.state(net))}
    moves = list(convert.LAYOUTS[layout].rows(net))
    assert {move.ours for move in moves} == {*ours}
    assert {n for move in moves for n in move.theirs} == {
        n for n in theirs if not re.fullmatch(convert.LAYOUTS[layout].ignored, n)
    }
    for move in moves:
        found = move.here([np.broadcast_to(np.float32(0), theirs[n]) for n in move.theirs]).shape
        want = ours[move.ours] if move.slice is None else ours[move.ours][1:]
        assert found == want, (move.theirs, move.ours)


@pytest.mark.parametrize("grid", [(6, 9), (16, 16), (3, 4)])
def test_positions_are_resized_as_by_pytorch(grid):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1 + 64, 5)).astype(np.float32)
    square = torch.from_numpy(table[1:].reshape(1, 8, 8, 5)).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(square, grid, mode="bicubic", antialias=True, align_corners=False)
    got = nets.patches.resize_positions(table, grid, 1)
    np.testing.assert_allclose(got[1:], wide.permute(0, 2, 3, 1).reshape(-1, 5).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[0], table[0])

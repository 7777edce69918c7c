"""Our nets against the public PyTorch modules, run side by side; not collected by a plain `pytest`:

pip install 'jdiff[parity]'; JDIFF_OFFICIAL=folder/of/clones pytest -n 0 tests/parity/parity_nets.py
"""

import numpy as np
import pytest
from test_convert import abstract, output

from jdiff import convert
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

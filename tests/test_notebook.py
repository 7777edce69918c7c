"""The notebooks run from top to bottom, and the numbers that they compute hold."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.long

HERE = Path(__file__).parent.parent
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # quick to compile, one device
ORDERS = {"DDIM": 1, "DPM-Solver++(2M)": 2, "DEIS(3)": 3, "UniPC(3)": 4}  # nominal; a corrector adds one


def execute(name):
    """What the last cell prints, as JSON."""
    notebook = nbformat.read(HERE / "notebooks" / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    where = {"metadata": {"path": HERE / "notebooks"}}  # opened as in a checkout, where jdiff need not be installed
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("XLA_FLAGS", FLAGS)
        client.execute()
    outputs = notebook.cells[-1]["outputs"]
    return json.loads("".join(o["text"] for o in outputs if o.get("name") == "stdout"))


@pytest.fixture(scope="module")
def numbers():
    return execute("quickstart")


def test_measured_orders(numbers):
    assert numbers["reference_error"] < 1e-8
    for name, order in ORDERS.items():
        assert order - 0.1 < numbers["slopes"][name] < order + 0.8, name


def test_few_steps_and_own_code(numbers):
    rms = numbers["rms_few"]
    assert rms["UniPC(3)"] < rms["DPM-Solver++(2M)"] < rms["DDIM"]
    assert numbers["to_points"] < 0.01
    assert numbers["rms_own"] < rms["DDIM"]
    assert abs(numbers["sde_std"] - numbers["data_std"]) < 0.1


def test_steering():
    found = execute("steering")
    log_z, error, exact = found["log_z"]
    assert abs(log_z - exact) < 3 * error + 0.05
    mean, target, unsteered = found["mean"]
    assert abs(mean - target) < 0.08 < target - unsteered
    base, best, steered = found["rewards"]
    assert base < best < steered
    few, many = found["curves"]["25"], found["curves"]["200"]
    assert few[0] < few[-1] < many[-1] and abs(many[-1] - found["exact_mean"]) < 0.08


def test_interpolants():
    found = execute("interpolants")
    assert max(found["backward"].values()) < 1.5 * found["least"]
    assert max(found["forward"].values()) < 1.5 * found["there"]
    assert found["likelihood"] < 1e-3
    for measured, true in found["bridge"].values():
        assert abs(measured - true) < 4 * (0.3 * 0.6 + true**2) ** 0.5 / 1000**0.5


def test_video_schedules():
    found = execute("video_schedules")
    errors = found["errors"]
    assert errors["lag 1: pyramid"] < errors["together"] < 0.2  # the pyramid is the better integrator here
    assert found["interpolation"] < 4 / 2000**0.5 and found["stream"] < 1e-5
    assert found["ready"] == 40 - 8 + 1

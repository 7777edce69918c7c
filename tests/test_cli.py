"""The command line and reproduction: what a new user types, and what they get wrong."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import cli, reproduce, solvers

TINY = "--net DiT --net-options patch 2 width 16 depth 1 heads 2 --batch 16 --steps 4 --warmup 1".split()
LOGS = "--log-every 2 --checkpoint-every 4 --no-tensorboard".split()


@pytest.fixture(autouse=True)
def single_precision():
    """As users run it: 32-bit JAX. The command line is float32 throughout."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("cli") / "run"
    with jax.enable_x64(False):
        assert cli.main(["train", "--out", str(run), *TINY, *LOGS]) == 0
    return run


def failure(capsys, *args):
    """One line on standard error and exit code 2."""
    assert cli.main(list(map(str, args))) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in text
    return text


def test_help_teaches(capsys):
    assert cli.main([]) == 0
    assert "jdiff reproduce fast-sampling" in capsys.readouterr().out
    for command in ("train", "sample", "statistics"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "--seed" in capsys.readouterr().out
    assert cli.main(["reproduce", "--help"]) == 0
    assert "fast-sampling" in capsys.readouterr().out


def test_list_names_everything(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in (*solvers.ALL, "edm", "karras", "DiT-XL/2", "UNet-CIFAR", "fast-sampling"):
        assert name in shown


def test_list_solvers_says_when_to_use_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main(["list", "solvers"]) == 0
    shown = capsys.readouterr().out
    for name, make in solvers.ALL.items():
        s = make()
        assert s.name == name and 10 < len(s.when) <= 95 and s.references and s.prediction
        assert any(name in line and s.when in line and s.references[0] in line for line in shown.splitlines()), name
    assert cli.main(["list", "sovers"]) == 2
    assert "did you mean solvers" in capsys.readouterr().err


def test_sample_writes_pictures_that_do_not_depend_on_the_batch(trained, tmp_path, capsys):
    args = ["sample", str(trained), "--solver", "ddpm", "--nfe", "3", "--n", "5"]
    for name, batch in (("a", 5), ("b", 2)):
        assert cli.main([*args, "--batch", str(batch), "--out", str(tmp_path / name)]) == 0
    a, b = (np.load(tmp_path / f"{n}.npz") for n in "ab")
    assert a["images"].shape == (5, 8, 8, 1) and a["images"].dtype == np.float32
    np.testing.assert_allclose(a["images"], b["images"], atol=1e-5)
    np.testing.assert_array_equal(a["labels"], np.arange(5) % 10)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    guided = ["--solver", "dpm_solver_pp(order=2, eta=1.0)", "--guidance", "2.0", "--label", "7", "--check"]
    assert cli.main([*args, *guided, "--out", str(tmp_path / "c")]) == 0
    assert (np.load(tmp_path / "c.npz")["labels"] == 7).all()
    assert "3 network evaluations each (dpm_solver_pp)" in " ".join(capsys.readouterr().out.split())


def test_sample_chooses_a_solver_by_itself(trained, tmp_path, capsys, monkeypatch):
    quick = {"candidates": ("ddim", "unipc(order=2)"), "batches": 1, "tune": 0, "steps": 16, "measured": False}
    monkeypatch.setattr(solvers, "auto", functools.partial(solvers.auto, **quick))
    args = ["sample", str(trained), "--solver", "auto", "--nfe", "3", "--n", "4", "--out", str(tmp_path / "a")]
    assert cli.main(args) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "NFE 3:" in shown and "error on held-out noise" in shown and "3 network evaluations each" in shown
    assert np.isfinite(np.load(tmp_path / "a.npz")["images"]).all()


def test_what_users_get_wrong(trained, tmp_path, capsys):
    says = lambda *args: failure(capsys, *args)
    assert "did you mean sample" in says("smaple")
    assert "did you mean unipc" in says("sample", trained, "--solver", "unpic")
    assert "unknown option of unipc 'ordr'; did you mean order" in says("sample", trained, "--solver", "unipc(ordr=2)")
    assert "cannot read the solver" in says("sample", trained, "--solver", "unipc(2)")
    assert "NFE is 0" in says("sample", trained, "--nfe", 0)
    assert "unknown time grid 'karas'; did you mean karras" in says("sample", trained, "--grid", "karas")
    assert "10 classes" in says("sample", trained, "--label", 12)
    assert "did you mean fast-sampling" in says("reproduce", "fast-samplng")
    assert "n is 5000" in says("reproduce", "fast-sampling", "--n", 5000, "--out", tmp_path / "r")
    assert "holds no checkpoint" in says("sample", tmp_path)
    assert "learning_rate" in says("train", "--out", trained, *TINY, *LOGS, "--learning-rate", 0.5)
    assert "batch 12 is not divisible by the mesh's 8 devices; the nearest is 16" in says(
        "train", "--out", tmp_path / "x", *TINY, *LOGS, "--batch", 12
    )
    plain = tmp_path / "plain"
    assert cli.main(["train", "--out", str(plain), *TINY, *LOGS, "--label-dropout", "0"]) == 0
    assert "null class" in says("sample", plain, "--guidance", 2)
    assert cli.main(["train", "--out", str(tmp_path / "nolabels"), *TINY, *LOGS, "--no-labels"]) == 0
    assert "trained without" in says("sample", tmp_path / "nolabels", "--guidance", 2)


# Reproduction ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    out: str
    seed: int = 0


def toy(calls, fail_at=None):
    def cell(context, row, column):
        if (row, column) == fail_at:
            raise KeyboardInterrupt
        calls.append((row, column))
        return {"error": context * column * {"a": 1.0, "b": 2.0}[row], "n": 10}

    return reproduce.Table(
        "toy", "A toy.", "nothing", ("a", "b"), (5, 10), "solver", "NFE", "error", Settings,
        lambda s: 1.0 + s.seed, cell, lambda context, cells, out: ["- claim: holds"],
        (reproduce.Published("Paper", "table 1", "other data", (5,), {"a": (3.25,)}),),
    )  # fmt: skip


def test_a_killed_reproduction_goes_on_where_it_was(tmp_path):
    settings, calls = Settings(str(tmp_path)), []
    with pytest.raises(KeyboardInterrupt):
        reproduce.run(toy(calls, fail_at=("a", 10)), settings)
    assert calls == [("a", 5), ("b", 5)] and not (tmp_path / "table.md").exists()
    report = reproduce.run(toy(calls), settings).read_text()
    assert calls == [("a", 5), ("b", 5), ("a", 10), ("b", 10)]
    assert "| a | **5** | **10** |" in report and "| b | 10 | 20 |" in report
    assert "claim: holds" in report and "| a | 3.25 |" in report and "seed = 0" in report
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert (tmp_path / "table.csv").read_text().splitlines()[:2] == ["solver,NFE,error,n", "a,5,5.0,10"]
    highest = dataclasses.replace(toy(calls), highest=True)
    assert "| b | **10** | **20** |" in reproduce.run(highest, settings).read_text() and len(calls) == 4
    with pytest.raises(ValueError, match="seed = 0 there, 1 now"):
        reproduce.run(toy(calls), Settings(str(tmp_path), seed=1))


def test_what_was_not_computed_is_a_dash():
    assert [reproduce.number(v) for v in (None, float("nan"), 0.12345, 320.8)] == ["-", "-", "0.123", "321"]


@pytest.mark.long
def test_one_cell_of_fast_sampling(tmp_path):
    from jdiff.experiments import fast_sampling as experiment

    settings = experiment.Settings(out=str(tmp_path), steps=110, width=16, depth=1, n=64)
    context = experiment.prepare(settings)
    cell = experiment.cell(context, "UniPC-3", 5)
    assert cell["evaluations"] == 5 and cell["n"] == 64 and cell["n_reference"] == 899
    assert 0 < cell["floor"] < 5 < cell["Fréchet distance"] < 100  # hardly trained: far, but no noise
    assert (tmp_path / cell["picture"]).exists()
    json.dumps(cell)
    assert set(experiment.HIGH_ORDER) < set(experiment.SOLVERS)
    for text in experiment.SOLVERS.values():
        assert solvers.parse(text).steps(5) >= 3
    assert jnp.isfinite(context.x).all()


def test_statistics_of_a_run_and_a_solver_that_uses_them(trained, tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    assert cli.main(["statistics", str(trained), "--out", str(out), "--n", "32", "--batch", "16", "--n-lam", "30"]) == 0
    assert "jdiff sample" in capsys.readouterr().out
    solver = f"dpm_solver_v3(statistics='{out}')"
    args = ["sample", str(trained), "--solver", solver, "--nfe", "4", "--n", "2", "--out", str(tmp_path / "x")]
    assert cli.main(args) == 0 and np.isfinite(np.load(tmp_path / "x.npz")["images"]).all()
    wrong = args[:3] + ["dpm_solver_v3(statistics='nowhere')"]
    assert "no statistics at nowhere; make them with: jdiff statistics RUN" in failure(capsys, *wrong)

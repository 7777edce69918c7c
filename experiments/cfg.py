"""Classifier-free guidance and its kin on trained digits models, by guidance scale, at DDIM's 10 steps.

    jdiff reproduce cfg

Claims of the papers, in their order: guidance trades diversity for fidelity (Ho and Salimans 2022); rescaling and
intervals repair the distance at high scales (Lin et al. 2023; Kynkäänniemi et al. 2024), rising schedules better than
constant ones (Wang et al. 2024); CFG++ keeps samples in range (Chung et al. 2024); CFG-Zero* betters CFG on flows (Fan
et al. 2025); autoguidance betters the distance without loss of diversity (Karras et al. 2024).
"""

from typing import Any

from jdiff import guidance
from jdiff.experiments._claims import Claim
from jdiff.experiments._guided import Model, Row, Settings, paired, sampled, table

SCALES = (1.5, 3.0)
INTERVAL = (0.1, 0.6)


def rule(wrap: Any, cost: float = 2.0) -> Row:
    return lambda m, scale: (sampled(m, wrap(m, scale)), cost)


def inside(m: Model) -> float:
    """Evaluations a step where the second branch is evaluated inside the interval alone."""
    t = m.times[:-1]
    return 1.0 + float(((t > INTERVAL[0]) & (t <= INTERVAL[1])).mean())


def interval(m: Model, scale: float) -> tuple[Any, float]:
    return sampled(m, guidance.cfg(m.cond, m.null, scale, interval=INTERVAL)), inside(m)


ROWS: dict[str, Row] = {
    "conditional model": rule(lambda m, w: m.cond, 1.0),
    "CFG": rule(lambda m, w: guidance.cfg(m.cond, m.null, w)),
    "CFG, rescale 0.7": rule(lambda m, w: guidance.cfg(m.cond, m.null, w, rescale=0.7)),
    "CFG, interval": interval,
    "CFG, linear schedule": rule(lambda m, w: guidance.cfg(m.cond, m.null, guidance.linear(m.cond.process, w))),
    "CFG++, lambda = scale / 5": rule(lambda m, w: guidance.cfg_pp(m.cond, m.null, w / 5.0, m.times)),
    "APG": rule(lambda m, w: guidance.apg(m.cond, m.null, w, momentum=-0.5, norm=5.0)),
    "autoguidance": rule(lambda m, w: guidance.autoguidance(m.cond, m.weak(), w)),
    "flow: conditional model": rule(lambda m, w: m.cond, 1.0),
    "flow: CFG": rule(lambda m, w: guidance.cfg(m.cond, m.null, w)),
    "flow: CFG-Zero*, no zero": rule(lambda m, w: guidance.cfg_zero(m.cond, m.null, w)),
    "flow: CFG-Zero*, first step zero": rule(lambda m, w: guidance.cfg_zero(m.cond, m.null, w, float(m.times[1]))),
}

FD = "Fréchet distance"
TABLE = table(
    "cfg",
    "Guidance between two branches: distance and diversity of digits by the guidance scale.",
    rows=ROWS,
    columns=SCALES,
    column_title="guidance scale",
    defaults=Settings("", n=150),
    kinds={row: "flow" for row in ROWS if row.startswith("flow")},
    claims=(
        Claim("CFG: accuracy at scale 3 less the conditional model's",
              lambda e: e("CFG", 3.0, "accuracy") - e("conditional model", 3.0, "accuracy"), at_least=0.1),
        Claim("CFG: recall at scale 3 over the conditional model's",
              lambda e: e("CFG", 3.0, "recall") / e("conditional model", 3.0, "recall"), at_most=0.8),
        *(Claim(f"{row} at scale 3: distance over CFG's", lambda e, row=row: e(row, 3.0) / e("CFG", 3.0), at_most=0.95)
          for row in ("CFG, rescale 0.7", "CFG, interval", "CFG, linear schedule", "APG")),
        Claim("CFG++: elements out of range over CFG's, both at scale 3",
              lambda e: e("CFG++, lambda = scale / 5", 3.0, "out of range") / e("CFG", 3.0, "out of range"),
              at_most=0.8),
        Claim("CFG++: its best distance over CFG's best",
              lambda e: min(e("CFG++, lambda = scale / 5", c) for c in SCALES) / min(e("CFG", c) for c in SCALES),
              at_most=0.95),
        Claim("autoguidance: its best distance over the conditional model's",
              lambda e: min(e("autoguidance", c) for c in SCALES) / e("conditional model", 3.0), at_most=0.95),
        Claim("autoguidance: its best distance over CFG's best",
              lambda e: min(e("autoguidance", c) for c in SCALES) / min(e("CFG", c) for c in SCALES), at_most=0.95),
        Claim("autoguidance at scale 1.5: recall over CFG's",
              lambda e: e("autoguidance", 1.5, "recall") / e("CFG", 1.5, "recall"), at_least=1.1),
        *(Claim(f"{row} at scale 3: distance over CFG's on flows",
                lambda e, row=row: e(row, 3.0) / e("flow: CFG", 3.0), at_most=0.95)
          for row in ROWS if "Zero" in row),
        Claim("CFG-Zero* without zeroing, scale 3: paired difference to CFG over its standard error",
              lambda e: paired(e, ("flow: CFG-Zero*, no zero", 3.0), ("flow: CFG", 3.0), FD), at_most=-2.0),
    ),
    notes=(
        "Three models and three noises, 150 samples each, DDIM on a uniform grid. The weak model of autoguidance is "
        "the same net after 500 of 4,000 training steps. The interval is (0.1, 0.6] of the process's time.",
    ),
)  # fmt: skip

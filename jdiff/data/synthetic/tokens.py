"""Sources of tokens whose law, entropy and posteriors are known: tables and Markov chains. NumPy on the host.

`posterior(likelihood)` is the exact network of any discrete process: likelihood (batch, length, V) is q(x_t | x0 = k)
of each token (`MaskReplace.likelihood`), and it returns p(x0_i = k | x_t), the same shape.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True, eq=False)
class Table:
    """Any law of a few tokens: p (V, .., V), one axis a token, float64; sums to 1. ValueError else."""

    p: np.ndarray

    def __post_init__(self):
        if abs(self.p.sum() - 1) > 1e-9 or self.p.min() < 0 or len({*self.p.shape}) != 1:
            raise ValueError(
                f"Table: expected probabilities (V, .., V) of sum 1, got {self.p.shape}, sum {self.p.sum()}"
            )

    @classmethod
    def random(cls, vocabulary: int, length: int, seed: int = 0, concentration: float = 0.6) -> "Table":
        """Drawn from a Dirichlet law: small concentrations give strongly dependent tokens."""
        p = np.random.default_rng(seed).dirichlet(np.full(vocabulary**length, concentration))
        return cls(p.reshape((vocabulary,) * length))

    @property
    def entropy(self) -> float:
        """Nats a sequence."""
        p = self.p[self.p > 0]
        return float(-(p * np.log(p)).sum())

    @cached_property
    def states(self) -> np.ndarray:
        """All sequences (V^length, length), int32, in the order of p.ravel()."""
        return np.asarray(list(itertools.product(*map(range, self.p.shape))), np.int32)

    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """(n, length) int32."""
        return self.states[np.random.default_rng(seed).choice(self.p.size, n, p=self.p.ravel())]

    def histogram(self, x: Any) -> np.ndarray:
        """How often each sequence occurs among x (n, length): counts shaped like p.ravel()."""
        return np.bincount(np.ravel_multi_index(np.asarray(x).T, self.p.shape), minlength=self.p.size)

    def posterior(self, likelihood: Float[Array, "batch length v"]) -> Float[Array, "batch length v"]:
        """p(x0_i | x_t), by enumeration."""
        joint = jnp.asarray(self.p.ravel(), likelihood.dtype)
        for i in range(self.p.ndim):
            joint = joint * likelihood[:, i, self.states[:, i]]
        joint = joint / joint.sum(-1, keepdims=True)
        marginals = [
            joint.reshape(-1, *self.p.shape).sum([j + 1 for j in range(self.p.ndim) if j != i])
            for i in range(self.p.ndim)
        ]
        return jnp.stack(marginals, 1)


@dataclass(frozen=True, eq=False)
class Chain:
    """A Markov chain of `length` tokens: initial (V,), transition (V, V) with rows that sum to 1. ValueError else."""

    initial: np.ndarray
    transition: np.ndarray
    length: int

    def __post_init__(self):
        v, rows = self.initial.shape[0], np.concatenate([self.initial[None], self.transition])
        if self.transition.shape != (v, v) or abs(rows.sum(1) - 1).max() > 1e-9 or rows.min() < 0:
            raise ValueError(f"Chain: expected rows of probabilities, ({v},) and ({v}, {v}); got sums {rows.sum(1)}")

    @classmethod
    def random(cls, vocabulary: int, length: int, seed: int = 0, concentration: float = 0.3) -> "Chain":
        """Dirichlet rows, started from the stationary law."""
        P = np.random.default_rng(seed).dirichlet(np.full(vocabulary, concentration), vocabulary)
        P = 0.98 * P + 0.02 / vocabulary
        values, vectors = np.linalg.eig(P.T)
        first = np.abs(np.real(vectors[:, np.argmax(np.real(values))]))
        return cls(first / first.sum(), P, length)

    @property
    def entropy(self) -> float:
        """Nats a sequence."""
        h = lambda p: -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
        law, total = self.initial, float(h(self.initial))
        for _ in range(self.length - 1):
            total += float(law @ h(self.transition))
            law = law @ self.transition
        return total

    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """(n, length) int32."""
        u = np.random.default_rng(seed).random((n, self.length, 1))
        x = np.zeros((n, self.length), np.int32)
        for i in range(self.length):
            p = np.broadcast_to(self.initial, (n, len(self.initial))) if i == 0 else self.transition[x[:, i - 1]]
            x[:, i] = (np.cumsum(p, -1)[:, :-1] < u[:, i]).sum(-1)
        return x

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Nats (n,) of x (n, length)."""
        with np.errstate(divide="ignore"):
            return np.log(self.initial)[x[:, 0]] + np.log(self.transition)[x[:, :-1], x[:, 1:]].sum(1)

    def posterior(self, likelihood: Float[Array, "batch length v"]) -> Float[Array, "batch length v"]:
        """p(x0_i | x_t), by messages forward and backward."""
        P = jnp.asarray(self.transition, likelihood.dtype)
        unit = lambda p: p / p.sum(-1, keepdims=True)
        forward = [jnp.broadcast_to(jnp.asarray(self.initial, likelihood.dtype), likelihood[:, 0].shape)]
        backward = [jnp.ones_like(forward[0])]
        for i in range(1, self.length):
            forward.append(unit((forward[-1] * likelihood[:, i - 1]) @ P))
            backward.append(unit((backward[-1] * likelihood[:, -i]) @ P.T))
        return unit(jnp.stack(forward, 1) * likelihood * jnp.stack(backward[::-1], 1))

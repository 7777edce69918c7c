"""Guidance by gradients, models composed and mixed, factor graphs, perturbed attention, search over starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

import jdiff
from jdiff import exact, guidance, nets, process, solvers, times

VP, FLOW, EDM = process.vp_linear(), process.flow(), process.edm()
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (5, 2), jnp.float64)
T = jnp.float64(0.6)


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def toy(p, mean, gain, prediction="x0"):
    m = np.asarray(mean)
    return jdiff.denoiser(lambda x, t: gain * x + jnp.asarray(m, x.dtype) * (1.0 + 0.3 * t), p, prediction)


# --- classifiers and losses
WEIGHTS, MEANS, VARS = np.array([0.3, 0.7]), np.array([[1.0, 0.0], [-0.5, 0.8]]), (0.2, 0.4)
MIX = exact.mixture(WEIGHTS, MEANS, VARS)
PARTS = [exact.gaussian(m, v) for m, v in zip(MEANS, VARS, strict=True)]


@pytest.mark.parametrize("p", [VP, EDM], ids=["vp", "edm"])
def test_exact_classifier_at_scale_one_is_the_conditional_score(p):
    """log p(y | x_t) of the components of a mixture: Bayes. Other scales temper it: 2 is another thing."""
    logits = lambda x, t: jnp.stack(
        [np.log(w) + g.log_density(p, x, t) for w, g in zip(WEIGHTS, PARTS, strict=True)], axis=1
    )
    labels = jnp.asarray([0, 1, 0, 1, 1])
    guided = guidance.classifier(MIX.denoiser(p), logits, labels)
    expected = np.where(labels[:, None] == 0, *(g.denoiser(p)(X, 0.5) for g in PARTS))
    close(guided(X, 0.5), expected, 1e-6)
    double = guidance.classifier(MIX.denoiser(p), logits, labels, 2.0)(X, 0.5)
    close(double, 2 * expected - MIX.denoiser(p)(X, 0.5), 1e-6)


W = np.array([[0.5, -1.0, 0.3], [0.2, 0.7, -0.4]])


def linear_logits(x0):
    return x0 @ jnp.asarray(W, x0.dtype)


def test_elucd_calibrations():
    """The gradient of tau1 f_y - log sum exp(tau2 f) at the detached x0, in units of the score; norm scaling."""
    d, y = toy(VP, [0.3, -0.2], 0.4), jnp.asarray([0, 1, 2, 1, 0])
    D, a, s = np.asarray(d(X, T)), float(VP.alpha(0.6)), float(VP.sigma(0.6))
    for tau1, tau2 in ((1.0, 1.0), (1.0, 0.5), (2.0, 0.0)):
        r = np.exp(tau2 * D @ W) / np.exp(tau2 * D @ W).sum(1, keepdims=True)
        G = tau1 * W.T[np.asarray(y)] - tau2 * r @ W.T
        found = guidance.classifier(d, linear_logits, y, 0.7, on="x0", tau1=tau1, tau2=tau2)(X, T)
        close(found, D + 0.7 * s * s / a * G)
        norm = lambda v: np.linalg.norm(v, axis=1, keepdims=True)
        scaled = guidance.classifier(d, linear_logits, y, 0.7, on="x0", tau1=tau1, tau2=tau2, normalize=True)(X, T)
        close(scaled, D + 0.7 * G * norm(X) / norm(G))
    bump = guidance.classifier(d, linear_logits, y, guidance.sine(VP, 0.7, 2.0), on="x0")
    close(bump(X, T), guidance.classifier(d, linear_logits, y, 0.7 * (1 + 2 * np.sin(0.6 * np.pi)), on="x0")(X, T))
    limited = guidance.classifier(d, linear_logits, y, 0.7, on="x0", interval=(0.7, 0.9))
    close(limited(X, T), D)
    smooth = guidance.softplus(5.0)
    assert abs(float(smooth(jnp.asarray(3.0))) - 3.0) < 1e-6 and 0 < float(jax.grad(smooth)(0.0)) < 1


def test_full_and_identity_jacobians():
    """Data N(m, C): dD/dx is the gain matrix J, so "full" moves by J' grad and "identity" by grad; one direction where
    C is a multiple of 1."""
    data, c = exact.gaussian([0.2, -0.1], [[0.6, 0.2], [0.2, 0.3]]), jnp.asarray([1.0, 2.0])
    loss = Partial(lambda c, x0: x0 @ c, c)
    d, a, s = data.denoiser(VP), float(VP.alpha(0.6)), float(VP.sigma(0.6))
    J = a * data.cov @ np.linalg.inv(a * a * data.cov + s * s * np.eye(2))
    moved = {j: guidance.loss_guidance(d, loss, 0.3, jacobian=j)(X, T) - d(X, T) for j in ("full", "identity")}
    close(moved["full"], np.broadcast_to(-0.3 * J.T @ c, (5, 2)))
    close(moved["identity"], np.broadcast_to(-0.3 * c, (5, 2)))
    sphere = exact.gaussian([0.2, -0.1], 0.5).denoiser(FLOW)
    square = lambda x0: jnp.sum((x0 - 1.0) ** 2, axis=1)
    a, b = (guidance.loss_guidance(sphere, square, 0.1, jacobian=j)(X, T) - sphere(X, T) for j in ("full", "identity"))
    cosine = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    close(cosine, 1.0)
    three = guidance.loss_guidance(sphere, square, 0.1, inner=3)(X, T)
    close(three - 1.0, (sphere(X, T) - 1.0) * 0.8**3)


def test_flowchef_and_dps_are_their_papers_loops():
    d, y = toy(FLOW, [0.2, -0.1], 0.4), jnp.asarray([0.7])
    t, start = times.uniform(FLOW, 5), FLOW.prior(KEY, (4, 2), dtype=jnp.float64)
    loss = Partial(lambda y, x0: jnp.sum((x0[:, :1] - y) ** 2, axis=1), y)
    each = lambda x0: np.concatenate([2 * (np.asarray(x0)[:, :1] - 0.7), np.zeros((4, 1))], 1)
    x = start
    for i in range(5):
        v = d(x, t[i], "velocity")
        for _ in range(2):  # the velocity is kept, x0 = x - t v moves with x
            x = x - 0.2 * each(x - t[i] * v)
        x = x + (t[i + 1] - t[i]) * v
    euler = solvers.euler()(FLOW, t)
    close(jdiff.sample(guidance.flowchef(d, loss, 0.2, t, inner=2), euler, start), x, 1e-5)
    x = start
    for i in range(5):
        g = jax.grad(lambda x, i=i: jnp.sum(loss(d(x, t[i]))))(x)
        x = x + (t[i + 1] - t[i]) * d(x, t[i], "velocity") - 0.3 * g
    close(jdiff.sample(guidance.dps(d, loss, 0.3, t), euler, start), x, 1e-5)


# --- mixtures and factor graphs
def test_learned_mixtures():
    models = [toy(VP, [0.8, -0.5], 0.3), toy(VP, [-0.3, 0.4], 0.6), toy(VP, [0.0, 0.0], 0.1, "eps")]
    outs = [np.asarray(m(X, T)) for m in models]
    fixed = lambda logits: lambda x, t, _: jnp.asarray(logits).reshape(3, 1, 1)
    for i in range(3):
        close(guidance.mix(models, fixed(np.where(np.arange(3) == i, 0.0, -np.inf)))(X, T), outs[i], 1e-12)
    close(guidance.mix(models, fixed(np.zeros(3)))(X, T), np.mean(outs, 0))
    gate = lambda params, x, t, outs: jnp.stack([params * x, jnp.zeros_like(x)])
    two = guidance.mix(models[:2], Partial(gate, jnp.float64(2.0)))(X, T)
    w = 1 / (1 + np.exp(-2.0 * np.asarray(X)))
    close(two, outs[1] + w * (outs[0] - outs[1]))
    shared = guidance.mix(models[:2], Partial(gate, jnp.float64(2.0)), shared=(1,))(X, T)
    w = 1 / (1 + np.exp(-2.0 * np.asarray(X).mean(1, keepdims=True)))
    close(shared, outs[1] + w * (outs[0] - outs[1]))
    slope = jax.grad(lambda p: jnp.sum(guidance.mix(models[:2], Partial(gate, p))(X, T) ** 2))(jnp.float64(2.0))
    assert abs(float(slope)) > 1e-3
    with pytest.raises(ValueError, match=r"the gate returned \(2, 5, 1, 1\)"):
        guidance.mix(models[:2], lambda x, t, outs: jnp.zeros((2, 5, 1, 1)))(X, T)


def chain(n, rho=0.9):
    """The stationary AR(1) chain of unit variance."""
    return rho ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))


def exact_chain(n, sigma):
    """The exact denoiser of n frames of the chain at one noise level: D = C (C + sigma^2)^-1 x."""
    gain = jnp.asarray(np.linalg.solve(chain(n) + sigma**2 * np.eye(n), chain(n)))
    return jdiff.denoiser(lambda x, t: x @ gain, EDM, "x0")


def windowed(sigma, overlap, n, length=8, weight=-1.0):
    """The chain's factor graph from exact models of its windows, at stride length - overlap."""
    window, factors, start = exact_chain(length, sigma), [], 0
    while True:
        factors.append(guidance.Factor(window, start, start + length))
        if start + length >= n:
            return guidance.factor_graph(factors, n)
        start += length - overlap
        if overlap:
            factors.append(guidance.Factor(exact_chain(overlap, sigma), start, start + overlap, weight))


def test_factor_graph_is_the_chain():
    """Windows minus overlaps: exact as sigma -> 0, geometric in the overlap at sigma > 0; not without overlap."""
    sizes, off = {0: 24, 1: 22, 2: 20, 4: 24}, {}  # lengths that the windows tile
    for sigma in (1e-4, 0.1):
        for overlap, n in sizes.items():
            x = (
                sigma
                * jax.random.normal(KEY, (16, n), jnp.float64)
                @ np.linalg.cholesky(chain(n) / sigma**2 + np.eye(n)).T
            )
            a, b = (np.asarray(d(x, sigma, "score")) for d in (windowed(sigma, overlap, n), exact_chain(n, sigma)))
            off[sigma, overlap] = np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))
    assert max(off[1e-4, k] for k in (1, 2, 4)) < 1e-5 < off[1e-4, 0]
    assert off[0.1, 0] > 0.1 and off[0.1, 1] < 0.05 and off[0.1, 2] < 0.1 * off[0.1, 1] and off[0.1, 4] < 1e-4
    with pytest.raises(ValueError, match=r"position 7 .*add up to 3; expected 1"):
        windowed(0.1, 1, 22, weight=1.0)
    with pytest.raises(ValueError, match=r"spans \[20, 28\)"):
        guidance.factor_graph([guidance.Factor(toy(EDM, 0.0, 0.1), 20, 28)], 24)


def test_timelines():
    """One track is the model itself; each part follows its own tracks; windows of one network are one batch."""
    shapes = []

    def net(x, t, y):
        shapes.append(x.shape)
        return 0.5 * x + y

    con = jdiff.denoiser(net, FLOW, "x0", cond=jnp.full((3, 1, 1), 1.0))
    told = lambda v: con.with_cond(jnp.full((3, 1, 1), v))
    x = jax.random.normal(KEY, (3, 12, 4), jnp.float64)
    whole = guidance.timeline([guidance.Track(told(1.0), 0, 12)], told(0.0), 12, 4)
    close(whole(x, 0.5), told(1.0)(x, 0.5))
    tracks = [guidance.Track(told(1.0), 0, 6), guidance.Track(told(2.0), 6, 12)]
    shapes.clear()
    found = np.asarray(guidance.timeline(tracks, told(0.0), 12, 4)(x, 0.5) - 0.5 * x)[0, :, 0]
    close(found, [1, 1, 1, 1, 3, 3, 3, 3, 2, 2, 2, 2])  # 1 + 2 - 0 where two windows meet
    assert sorted(shapes) == [(3, 4, 4), (6, 8, 4)]
    arms = np.array([True, True, False, False])
    split = [
        guidance.Track(told(5.0), 0, 12, arms),
        *(guidance.Track(t.denoiser, t.start, t.stop, ~arms) for t in tracks),
    ]
    found = np.asarray(guidance.timeline(split, told(0.0), 12, 4)(x, 0.5) - 0.5 * x)[0]
    close(found[:, 0], 5.0)
    close(found[:, 3], [1, 1, 1, 1, 3, 3, 3, 3, 2, 2, 2, 2])
    with pytest.raises(ValueError, match="do not cover"):
        guidance.timeline(tracks[:1], told(0.0), 12, 4)
    with pytest.raises(ValueError, match="overlap is 3"):
        guidance.timeline(tracks, told(0.0), 12, 3)


# --- attention
IMAGES, LABELS = jax.random.normal(KEY, (2, 4, 4, 1), jnp.float32), jnp.asarray([0, 2])
SIZES = {
    "DiT": {"patch": 2, "width": 16, "depth": 2, "heads": 2},
    "UNet": {"width": 8, "multipliers": (1,), "blocks": 1, "attention_at": (4,), "head_width": 4},
}


def net(name="DiT", **options):
    """A small net whose last layers are not zero."""
    graph, state = nnx.split(nets.build(name, 4, 1, num_classes=3, rngs=nnx.Rngs(0), **SIZES[name], **options))
    noise = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda a: a + jnp.asarray(0.2 * noise.normal(size=a.shape), a.dtype), state))


@pytest.mark.parametrize("name", ["DiT", "UNet"])
def test_perturbed_attention(name):
    """u = 0 changes no bit; all heads of all layers at u = 1 are attention that returns v; half way is neither."""
    model, blind = net(name), net(name, attention=lambda q, k, v: v)
    layers, heads = len(model.attention_heads), max(model.attention_heads)
    run = jax.jit(lambda u: model(IMAGES, 0.5, LABELS, perturb=u))
    plain, values = jax.jit(lambda: (model(IMAGES, 0.5, LABELS), blind(IMAGES, 0.5, LABELS)))()
    u = jnp.zeros((2, layers, heads)).at[1].set(1.0)  # a perturbation a sample
    found, other, half = run(u), run(u[::-1]), run(0.5 * jnp.ones_like(u))
    np.testing.assert_array_equal(found[0], plain[0])
    np.testing.assert_array_equal(other[1], plain[1])
    close(jnp.stack([other[0], found[1]]), values, 1e-5)
    assert min(np.abs(values - plain).max(), np.abs(half - values).max(), np.abs(half - plain).max()) > 1e-4
    with pytest.raises(ValueError, match=f"perturb has shape .*expected \\({layers}, {heads}\\)"):
        model._perturbation(jnp.ones((layers + 1, heads)), 2)


def test_all_heads_of_one_layer_are_pag_on_that_layer():
    """Blocks by hand, the second one with the identity for its attention map; soft_pag of it, in one batch."""
    model, u = net(), jnp.asarray(guidance.head_mask([(1, 0), (1, 1)], (2, 2)))

    @jax.jit
    def by_hand():
        h, c = model.embed(IMAGES, jnp.float32(0.5), LABELS)
        for i in range(2):
            graph, state = nnx.split(model.blocks)
            block = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
            if i == 1:
                block.attention.attention = lambda q, k, v: v
            h = block(h, c)
        return model.project(h, c), model(IMAGES, 0.5, LABELS)

    worse, plain = by_hand()
    d = jdiff.denoiser(model, VP, "eps", cond=LABELS)
    guided = jax.jit(lambda d, x: d(x, 0.5, "eps"))(guidance.soft_pag(d, u, 3.0), IMAGES)
    assert np.abs(worse - plain).max() > 1e-3
    close(guided, plain + 3.0 * (plain - worse), 1e-5)


def test_soft_pag():
    """On a function that takes `perturb` as nets do: identities, with classifier-free guidance, schedules."""
    batches = []

    def net(w, x, t, cond):
        batches.append(len(x))
        y = cond["y"][:, None] if "y" in cond else 0.5
        return w * x + y - 0.1 * jnp.sum(cond["perturb"], axis=(1, 2)).astype(x.dtype)[:, None] * x

    w = jnp.float64(0.3)
    d = jdiff.denoiser(net, VP, "eps", params=w, cond=jnp.arange(5.0))
    u, y = guidance.head_mask([(0, 1)], (2, 2), 0.7), np.arange(5.0)[:, None]
    plain, worse = 0.3 * X + y, 0.23 * X + y
    np.testing.assert_array_equal(
        guidance.soft_pag(d, 0.0 * u, 3.0)(X, T, "eps"), guidance.perturbed(d, 0.0 * u)(X, T, "eps")
    )
    close(guidance.soft_pag(d, u, 0.0)(X, T, "eps"), plain)
    batches.clear()
    for together in (True, False):
        close(guidance.soft_pag(d, u, 3.0, together=together)(X, T, "eps"), plain + 3.0 * (plain - worse))
    assert batches == [10, 5, 5]
    close(guidance.soft_pag(d, u, lambda t: 5.0 * t)(X, T, "eps"), plain + 3.0 * (plain - worse))
    null = guidance.perturbed(d.with_cond(jnp.zeros(5)), 0.0 * u)
    parts = [guidance.perturbed(d, 0.0 * u), guidance.perturbed(d, u)]
    both = guidance.compose(parts, [2.0 + 3.0, -3.0], null)(X, T, "eps")
    close(both, 0.3 * X + 2.0 * y + 3.0 * (plain - worse))
    blind = jdiff.denoiser(net, VP, "eps", params=w)  # no labels
    close(guidance.soft_pag(blind, u, 3.0)(X, T, "eps"), 0.3 * X + 0.5 + 3.0 * 0.07 * X)
    with pytest.raises(ValueError, match=r"\[0, 1.5\]; expected"):
        guidance.perturbed(d, guidance.head_mask([(0, 1)], (2, 2), 1.5))
    with pytest.raises(ValueError, match=r"\(2, 0\); expected a pair below \(2, 2\)"):
        guidance.head_mask([(2, 0)], (2, 2))
    with pytest.raises(TypeError, match="lifted by"):
        guidance.perturbed(guidance.cfg(d, d, 2.0), u)


def test_head_hunter_is_greedy():
    worth = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 2.0, (1, 1): -1.0}
    score = lambda heads: sum(worth[h] for h in heads) - 2.5 * ((0, 1) in heads and (1, 0) in heads)
    found = guidance.head_hunter(score, list(worth), rounds=2)
    assert found.heads == ((0, 1), (0, 0)) and found.scores == (3.0, 4.0) and found.evaluations == 4 + 3
    assert guidance.head_hunter(score, list(worth), k=2, rounds=1).heads == ((0, 1), (1, 0))
    with pytest.raises(ValueError, match=r"head \(1, 1\) is not finite"):
        guidance.head_hunter(lambda heads: np.nan if (1, 1) in heads else 0.0, list(worth))
    with pytest.raises(ValueError, match="1 <= k rounds <= 4"):
        guidance.head_hunter(score, list(worth), rounds=5)


# --- starts
def test_golden_noise_to_first_order():
    """x' - x = k (high - low)(D_c - D_u) s0 / s1 + O(h^2); equal scales give the round trip of DDIM."""
    c, u = toy(VP, [0.8, -0.5], 0.3), toy(VP, [-0.3, 0.4], 0.6)
    left, round_trip = [], []
    for h in (0.02, 0.01):
        t = np.array([0.8, 0.8 - h, 0.0])
        s = VP.sigma(t)
        first = (5.5 - 1.0) * np.asarray(c(X, 0.8) - u(X, 0.8)) * s[0] / s[1] / guidance.step_gain(VP, t)[0]
        left.append(np.abs(guidance.golden_noise(c, u, X, t) - X - first).max())
        round_trip.append(np.abs(guidance.golden_noise(c, u, X, t, 2.0, 2.0) - X).max())
        assert left[-1] < 0.2 * np.abs(first).max()
    assert left[0] / left[1] > 3.5 and round_trip[0] / round_trip[1] > 3.5
    pairs = guidance.golden_pairs(c, u, X, times.uniform(VP, 10), lambda x: -jnp.sum(x**2, axis=1))
    assert pairs.start.shape == pairs.golden.shape == (int(pairs.kept.sum()), 2)
    assert (np.sum(pairs.golden**2, 1) < np.sum(pairs.start**2, 1)).all() and pairs.gain.shape == (5,)
    with pytest.raises(ValueError, match=r"times\[1\] is the data end"):
        guidance.golden_noise(c, u, X, [1.0, 0.0])
    with pytest.raises(ValueError, match=r"expected \(5,\), finite"):
        guidance.golden_pairs(c, u, X, times.uniform(VP, 10), lambda x: jnp.sum(x))


def test_noise_prompt_net_learns_golden_noise():
    """The identity when built; after training nearer to golden noises of other starts than the start itself is."""
    built = nets.NoisePromptNet(4, 1, num_classes=2, width=16, rngs=nnx.Rngs(0))
    x, y = jax.random.normal(KEY, (192, 4, 4, 1), jnp.float32), jnp.arange(192, dtype=jnp.int32) % 2
    close(built(x[:3], y[:3]), x[:3], 1e-5)
    shift = jnp.where(y == 0, 0.5, -0.5).astype(jnp.float32).reshape(-1, 1, 1, 1)
    golden = x + shift * x[:, ::-1].mean((1, 2), keepdims=True) + 0.5 * shift
    pairs = guidance.Pairs(x[:128], golden[:128], np.ones(128, bool), np.zeros(128))
    net = guidance.fit_noise_prompt(built, pairs, y[:128], KEY, steps=150, rate=1e-2)
    off = lambda a: float(jnp.mean((a - golden[128:]) ** 2))
    assert off(net(x[128:], y[128:])) < 0.3 * off(x[128:])
    with pytest.raises(ValueError, match="num_classes=2 labels, and none were given"):
        built(x)
    with pytest.raises(ValueError, match="128 pairs"):
        guidance.fit_noise_prompt(built, pairs, y, KEY)


def test_reflect_loop():
    """Feedback that says how far is used at once; without memory it is best-of-N; the budget and K are kept."""
    seen = []

    def sample(memory, i):
        seen.append(len(memory))
        return memory[-1][0] + memory[-1][1] if memory else float(10 + i)

    judge = lambda x: (1.0 if x == 3.0 else -abs(x - 3.0), np.sign(3.0 - x))
    found = guidance.reflect_loop(sample, judge, budget=20)
    assert (found.sample, found.accepted, found.tries) == (3.0, True, 8) and max(seen) == 3 and len(found.memory) == 8
    blind = guidance.reflect_loop(sample, judge, budget=4, memory=0)
    assert (blind.sample, blind.accepted, blind.tries) == (10.0, False, 4)
    with pytest.raises(ValueError, match="score of try 0 is nan"):
        guidance.reflect_loop(sample, lambda x: (np.nan, 0.0), budget=2)
    with pytest.raises(ValueError, match="budget is 0"):
        guidance.reflect_loop(sample, judge, budget=0)


D_ = toy(VP, [0.0, 0.0], 0.3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: guidance.loss_guidance(D_, lambda x: x, 0.1, inner=0), "inner is 0"),
        (lambda: guidance.loss_guidance(D_, lambda x: x, 0.1, jacobian="full", inner=2), "1 with jacobian='full'"),
        (lambda: guidance.loss_guidance(D_, lambda x: jnp.sum(x), 0.1)(X, T), r"returned shape \(\) for 5 samples"),
        (lambda: guidance.loss_guidance(D_, lambda x: x[:, 0], float("inf")), "weight is inf"),
        (lambda: guidance.classifier(D_, linear_logits, jnp.zeros(5, int), tau2=-1.0), "tau2 is -1.0"),
        (lambda: guidance.classifier(D_, linear_logits, jnp.zeros(5, int), interval=(0.2, 3.0)), "outside the process"),
        (lambda: guidance.factor_graph([], 5), "no factors"),
        (lambda: guidance.factor_graph([guidance.Factor(D_, 0, 2)], 2, axis=0), "axis is 0"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()

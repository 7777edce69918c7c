"""What training costs beside the bare step: images/s of `jdiff.train` and of jitted value_and_grad + update.

    python benchmarks/train_overhead.py --net DiT-Ti/2 --batch 128 --steps 60

Both in one process, in turns, the median of --rounds. The bare step has the same net, loss and optimizer, one batch
that never changes, and nothing else: no data, no averages, no guard, no log. The run has all of them (and writes
checkpoints, snapshots and metrics outside the timed part, as `seconds_per_step` of metrics.csv counts).
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jdiff import data, ema, recipe, train


def main(net: str, batch: int, steps: int, rounds: int) -> None:
    config = train.TrainConfig(
        net=net, batch=batch, steps=steps, warmup=1, tensorboard=False, log_every=steps, snapshot_every=steps
    )
    dataset = data.load(config.data, split=config.split)
    model = recipe.build_net(config, dataset, nnx.Rngs(0))
    graph, state = nnx.split(model)
    call = train.NetCall(graph, recipe.make_process(config), recipe.sigma_data_of(config))
    loss = recipe.make_loss(config, call, model.null_label)
    optimizer = recipe.make_optimizer(config)
    host = next(data.batches(dataset, batch, seed=0))
    image, label = jnp.asarray(host["image"]), jnp.asarray(host["label"])

    def bare(params, opt_state, key):
        value, grads = jax.value_and_grad(lambda p: loss(p, key, image, label).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    bare = jax.jit(bare, donate_argnums=(0, 1))
    full = jax.jit(train.make_train_step(loss, optimizer, ema.SIGMA_RELS), donate_argnums=0)
    params = nnx.to_pure_dict(state)
    copy = lambda: jax.tree.map(jnp.copy, params)

    def time_bare() -> float:
        p = copy()
        carry, key = (p, optimizer.init(p)), jax.random.key(0)
        *carry, value = bare(*carry, key)
        value.block_until_ready()
        began = time.perf_counter()
        for _ in range(steps):
            *carry, value = bare(*carry, key)
        value.block_until_ready()
        return (time.perf_counter() - began) / steps

    def time_full() -> float:
        """The compiled train step fed with new batches, as the loop does it."""
        p, sums = copy(), train.meter()
        s = train.init_state(p, optimizer, ema.SIGMA_RELS)
        seed, stream = jnp.uint32(0), data.batches(dataset, batch, seed=0)
        s, sums = full(s, sums, {k: jnp.asarray(v) for k, v in next(stream).items()}, seed)
        sums.loss.block_until_ready()
        began = time.perf_counter()
        for _ in range(steps):
            s, sums = full(s, sums, {k: jnp.asarray(v) for k, v in next(stream).items()}, seed)
        sums.loss.block_until_ready()
        return (time.perf_counter() - began) / steps

    def time_run() -> float:
        seen = []
        with tempfile.TemporaryDirectory() as out:
            train.train(
                dataclasses.replace(config, out=out), lambda step, m: seen.append(m["seconds_per_step"]), quiet=True
            )
        return seen[-1]

    seconds = {"bare": [], "train step": [], "whole run": []}
    for _ in range(rounds):
        for name, measure in zip(seconds, (time_bare, time_full, time_run), strict=True):
            seconds[name].append(measure())
    base = statistics.median(seconds["bare"])
    size = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    print(f"{net}, batch {batch}, {size:.2f}M parameters, {jax.devices()[0]}")
    for name, values in seconds.items():
        s = statistics.median(values)
        best = min(values) / min(seconds["bare"])
        print(
            f"{name:10s} {1e3 * s:8.2f} ms a step {batch / s:8.0f} images/s   {s / base:.3f} x bare (best: {best:.3f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="DiT-Ti/2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.net, arguments.batch, arguments.steps, arguments.rounds)

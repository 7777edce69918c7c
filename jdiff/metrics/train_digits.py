"""Trains the digit classifier whose penultimate layer is `metrics.digit_features`, and writes its weights.

    python -m jdiff.metrics.train_digits

It sees the train half of the digits alone (898 images, moved and distorted at random), and prints its
accuracy on the other half. About half a minute on two CPU cores.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates

from jdiff import data

from .digits import NAME, WEIGHTS, classify_digits, embed_digits, init

STEPS, BATCH, SMOOTHING = 1500, 128, 0.1


def distort(key, image):
    """A random affine map of one image (8, 8, 1) near the identity: shifts of up to a pixel, 10 % of scale
    and shear."""
    key_matrix, key_shift = jax.random.split(key)
    matrix = jnp.eye(2) + 0.1 * jax.random.truncated_normal(key_matrix, -2.0, 2.0, (2, 2))
    shift = jax.random.uniform(key_shift, (2, 1), minval=-1.0, maxval=1.0)
    grid = jnp.indices((8, 8)).reshape(2, -1) - 3.5
    y, x = matrix @ grid + shift + 3.5
    return map_coordinates(image[..., 0], (y, x), 1, cval=-1.0).reshape(8, 8, 1)


@jax.jit
def accuracy(params, images, labels):
    return jnp.mean(classify_digits(params, images).argmax(1).astype(labels.dtype) == labels)


def train(seed: int):
    """Weights after STEPS steps of AdamW with a cosine schedule, and "mean" and "std" of the features over the
    train half; a function of the seed."""
    half = data.load("digits", split="train")
    half = jax.tree.map(jnp.asarray, half.take(np.arange(len(half))))
    key_init, key_data = jax.random.split(jax.random.key(seed))
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, STEPS), weight_decay=0.05)

    def loss(params, images, labels):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), SMOOTHING)
        return optax.softmax_cross_entropy(classify_digits(params, images), targets).mean()

    @jax.jit  # a loop around it, not `lax.scan`: XLA runs convolutions in a scan ten times slower on CPU
    def update(params, opt_state, key, row):
        images = jax.vmap(distort)(jax.random.split(key, BATCH), half["image"][row])
        grads = jax.grad(loss)(params, images, half["label"][row])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = init(key_init)
    opt_state = optimizer.init(params)
    for step in range(STEPS):
        row = data.batch_indices(len(half["label"]), BATCH, seed, step).astype(np.int32)
        params, opt_state = update(params, opt_state, jax.random.fold_in(key_data, step), row)
    features = embed_digits(params, half["image"])
    return params | {"mean": features.mean(0), "std": features.std(0)}


def held_out_accuracy(params) -> float:
    """Of the half that training never sees."""
    test = data.load("digits", split="test")
    return float(accuracy(params, *test.take(np.arange(len(test))).values()))


def main():
    from safetensors.numpy import save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="default: the file in the package")
    args = parser.parse_args()
    params = train(args.seed)
    metadata = {
        "name": NAME,
        "accuracy": f"{held_out_accuracy(params):.6f}",
        "seed": str(args.seed),
        "command": f"python -m jdiff.metrics.train_digits --seed {args.seed}",
        "jax": jax.__version__,
    }
    save_file({name: np.asarray(value) for name, value in params.items()}, args.output, metadata)
    args.output.chmod(0o644)  # safetensors writes files that only their owner can read
    print(f"held-out accuracy {metadata['accuracy']}; weights written to {args.output}")


if __name__ == "__main__":
    main()

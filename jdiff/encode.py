"""`jdiff encode`: images through an autoencoder, once, to a TFDS set of latents that `jdiff train` reads."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HELP = """Encode images to latents: a TFDS set (ArrayRecord, no TensorFlow) named image_latents in --out.

  jdiff convert vae.safetensors --layout diffusers-vae --net AutoencoderKL --size 256 --out autoencoder.safetensors
  jdiff encode imagenet/train --net autoencoder.safetensors --size 256 --out /data/tfds
  jdiff train --data tfds:image_latents --data-dir /data/tfds --net DiT-XL/2 --out runs/dit

IMAGES is what `jdiff train --data` takes: a folder or .zip with one folder a class, tfds:NAME, digits. A latent is a
draw of the encoder's law (--mean: its mean) times --scale; the mean and deviation that are printed should be about 0
and 1.
Nothing stands under the set's name before all of it is written.
"""


@dataclass(frozen=True)
class EncodeConfig:
    net: Path  # the autoencoder: a .safetensors file of `jdiff convert`, or a run
    out: Path = Path("latents")  # folder for TFDS sets; the set is out/image_latents
    size: int | None = None  # cut and resize the images to this square; none: as they are
    split: str | None = None  # of the images
    data_dir: Path | None = None  # where a TFDS set of images lies prepared
    batch: int = 32  # images at a time
    scale: float = 0.18215  # multiplies the latents; Stable Diffusion 1 and 2's
    mean: bool = False  # the mean of the encoder's law instead of a draw
    seed: int = 0  # of the draws; that of image i depends on the seed and on i alone


def encode(images: str, config: EncodeConfig) -> str:
    """Write the set, and say in a line what is in it. ValueError for a net that encodes nothing, or a size that does
    not fit it; FileExistsError where the set is there already."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jdiff import checkpoint, data, noise
    from jdiff.data.images import track
    from jdiff.nets.autoencoder import Gaussian

    if config.batch < 1 or not config.scale > 0:
        raise ValueError(f"encode: expected batch >= 1 and scale > 0, got {config.batch} and {config.scale}")
    if (config.out / "image_latents").exists():
        raise FileExistsError(f"{config.out / 'image_latents'} is there already: give another --out, or delete it")
    net, _, meta = checkpoint.load_params(config.net)
    if not hasattr(net, "encode"):
        raise ValueError(f"{config.net} holds a {meta['net']['name']}; expected an autoencoder, such as AutoencoderKL")
    found = data.load(images, split=config.split, size=config.size, data_dir=config.data_dir)
    height, width, channels = found.shape
    if channels != net.channels or height % net.factor or width % net.factor:
        raise ValueError(
            f"the images are {height} x {width} x {channels}; {meta['net']['name']} takes {net.channels} channels, and "
            f"heights and widths that {net.factor} divides: give --size"
        )
    graph, state = nnx.split(net)

    @jax.jit
    def latents(state: Any, x: jax.Array, index: jax.Array) -> jax.Array:
        z = nnx.merge(graph, state).encode(x)
        if isinstance(z, Gaussian):
            law, z = z, z.mean
            if not config.mean:
                z = z + jnp.exp(law.logvar / 2) * noise.normal(jax.random.key(config.seed), z, index)
        return config.scale * z

    totals = np.zeros(3)

    def examples() -> Iterator[tuple[np.ndarray, int]]:
        for start in track(range(0, len(found), config.batch), "encoding", len(found)):
            index = np.minimum(np.arange(start, start + config.batch), len(found) - 1)  # the last batch is full too
            batch = found.take(index)
            z = np.asarray(latents(state, jnp.asarray(batch["image"]), jnp.asarray(index, jnp.int32)))
            z = z[: len(found) - start]
            totals[:] += z.size, z.sum(dtype=np.float64), np.square(z, dtype=np.float64).sum()
            yield from zip(z, batch["label"], strict=False)

    from jdiff.data.latents import Builder

    shape = jax.eval_shape(latents, state, jnp.zeros((1, *found.shape)), jnp.zeros(1, jnp.int32)).shape[1:]
    about = json.dumps({"images": found.name, "net": config.net.name, "scale": config.scale, "seed": config.seed})
    names = found.class_names
    builder = Builder(
        shape=shape, class_names=names, split=config.split or "train", about=about, examples=examples,
        data_dir=str(config.out),
    )  # fmt: skip
    builder.download_and_prepare()
    n, total, square = totals
    deviation = np.sqrt(max(square / n - (total / n) ** 2, 0.0))
    return (
        f"{config.out / 'image_latents'}: {len(found):,} latents {shape}, mean {total / n:.3g}, standard deviation "
        f"{deviation:.3g}; train on them with --data tfds:image_latents --data-dir {config.out}"
    )


def run(args: Sequence[str]) -> None:
    """The command."""
    import tensorflow_datasets
    import tyro

    tensorflow_datasets.disable_progress_bar()  # there is one of our own
    named = bool(args) and not args[0].startswith("-")
    config = tyro.cli(EncodeConfig, args=args[named:], prog="jdiff encode IMAGES", description=HELP)
    if not named:
        raise ValueError("name the images first: jdiff encode IMAGES --net autoencoder.safetensors")
    print(encode(args[0], config))

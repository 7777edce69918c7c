"""`jdiff encode`: what it writes is what the autoencoder says, and train's data sets read it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdiff import checkpoint, cli, data, nets, noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorflow_datasets and what it imports


@pytest.mark.long
def test_encoded_images_are_a_set_of_latents(tmp_path, capsys):
    """Each latent is scale times a draw of the encoder's law, of the image and seed alone; labels go along."""
    net = nets.AutoencoderKL(8, 1, width=8, multipliers=(1, 2), blocks=1, latent_channels=2, rngs=nnx.Rngs(0))
    checkpoint.write_net(net, tmp_path / "vae.safetensors")
    options = ["--net", str(tmp_path / "vae.safetensors"), "--split", "test", "--out"]
    with jax.enable_x64(False):
        assert cli.main(["encode", "digits", *options, str(tmp_path / "a"), "--batch", "500", "--scale", "0.5"]) == 0
    assert "899 latents (4, 4, 2), mean" in " ".join(capsys.readouterr().out.split())
    found = data.load("tfds:image_latents:test", data_dir=tmp_path / "a")
    digits = data.load("digits", split="test")
    assert found.shape == (4, 4, 2) and found.class_names == digits.class_names
    rows = np.array([0, 3, 898])
    batch, images = found.take(rows), digits.take(rows)
    np.testing.assert_array_equal(batch["label"], images["label"])
    law = net.encode(jnp.asarray(images["image"]))
    z = noise.normal(jax.random.key(0), law.mean, jnp.asarray(rows, jnp.int32))
    wanted = 0.5 * (law.mean + jnp.exp(law.logvar / 2) * z)
    np.testing.assert_allclose(batch["image"], wanted, rtol=2e-5, atol=2e-6)
    assert cli.main(["encode", "digits", *options, str(tmp_path / "a")]) == 2
    assert "is there already" in " ".join(capsys.readouterr().err.split())
    coder = nets.VQAutoencoder(8, 1, width=8, multipliers=(1, 2), blocks=1, codes=5, rngs=nnx.Rngs(0))
    checkpoint.write_net(coder, tmp_path / "vae.safetensors")
    with jax.enable_x64(False):
        assert cli.main(["encode", "digits", *options, str(tmp_path / "vq"), "--batch", "900"]) == 0
    found = data.load("tfds:image_latents:test", data_dir=tmp_path / "vq").take(rows)
    np.testing.assert_allclose(
        found["image"], 0.18215 * coder.encode(jnp.asarray(images["image"])), rtol=2e-5, atol=1e-5
    )
    plain = nets.AutoencoderKL(8, 3, width=8, multipliers=(1, 2), blocks=1, rngs=nnx.Rngs(0))
    checkpoint.write_net(plain, tmp_path / "vae.safetensors")
    assert cli.main(["encode", "digits", *options, str(tmp_path / "b")]) == 2
    assert "takes 3 channels" in " ".join(capsys.readouterr().err.split())

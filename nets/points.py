"""A diffusion transformer for point clouds: the points' features in voxels, patches of voxels as tokens."""

from typing import Any, NamedTuple

from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .dit import DiT
from .patches import devoxelise, voxel_places, voxelise


class Told(NamedTuple):
    """The blocks' conditioning, and where the points lie in the volume."""

    c: Float[Array, "b2 1 d"]
    places: Float[Array, "b n 3"]


class PointDiT(DiT):
    """DiT for point clouds as in DiT-3D (2307.01831): x is (b, points, channels), its first three channels the place.

    The mean of the channels in each voxel, patches of voxels as tokens, DiT's blocks, and each point's output from the
    volume by trilinear interpolation: the order of the points does not matter. The time is one a sample.

    Args:
        image_size: voxels an axis, a number or three alike.
        channels: of a point, three or more.
        points: points of a cloud; a net takes clouds of one size, whatever it is.
        the rest: as for DiT, patch one number or three.
    """

    def __init__(self, image_size: int | tuple[int, ...], channels: int = 3, *, points: int = 2048, **options: Any):
        side = image_size if isinstance(image_size, int) else image_size[0]
        if channels < 3 or points < 1 or (not isinstance(image_size, int) and tuple(image_size) != (side,) * 3):
            raise ValueError(
                f"PointDiT: {image_size=}, {channels=}, {points=}; expected a cube of voxels, 3 channels or more, "
                "and 1 point or more"
            )
        self.points = points
        super().__init__(side, channels, **options)
        self._arguments = (*self._arguments, ("points", points))

    @property
    def size(self) -> tuple[int, ...]:
        """Voxels an axis."""
        return (self.image_size if isinstance(self.image_size, int) else self.image_size[0],) * 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (points, channels)."""
        return (self.points, self.channels)

    def embed(self, x: Float[Array, "b n c"], t: ArrayLike, y: Any = None) -> tuple[Array, Any]:
        """Tokens (b, m, d) of the voxels' patches; the conditioning and the points' places, `Told`."""
        self._check_sample(x)
        side = self.size[0]
        places = voxel_places(x[..., :3], side)
        h, c = self._embedded(voxelise(places, x, side), self._time_a_sample(t, x), y)
        return h, Told(c, places)

    def run(self, state: Float[Array, "b m d"], c: Any, *span: Any, **options: Any) -> Float[Array, "b m d"]:
        """As `DiT.run`."""
        return super().run(state, c.c, *span, **options)

    def project(self, state: Float[Array, "b m d"], c: Any) -> Float[Array, "b n c2"]:
        """Tokens after the last block to the points, in `dtype`."""
        return devoxelise(super().project(state, c.c), c.places)

"""Image data sets: one way in (`load`), batches that are a pure function of (seed, step), PNG out.

NumPy only; Pillow, Grain and TensorFlow Datasets are imported by the functions that need them.
"""

from .dataset import Dataset as Dataset
from .dataset import load as load
from .order import batch_indices as batch_indices
from .png import from_uint8 as from_uint8
from .png import save_grid as save_grid
from .png import to_uint8 as to_uint8
from .stream import batches as batches

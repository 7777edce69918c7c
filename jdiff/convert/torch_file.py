"""Weights files as NumPy arrays: safetensors, and PyTorch's and EDM's pickles, of which nothing is executed.

A pickle is a program that may call any function. Here only what builds tensors and plain containers is known, and it
builds NumPy arrays; modules of torch.nn and a few records become inert containers; EDM's networks, which carry their
source code, give up their arrays and the code is left alone. Any other name in the file is refused.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

BFLOAT16 = np.dtype(jnp.bfloat16)
KINDS = {
    "Float": np.dtype("<f4"), "Double": np.dtype("<f8"), "Half": np.dtype("<f2"), "BFloat16": BFLOAT16,
    "Long": np.dtype("<i8"), "Int": np.dtype("<i4"), "Short": np.dtype("<i2"), "Char": np.dtype("i1"),
    "Byte": np.dtype("u1"), "Bool": np.dtype("?"), "Untyped": np.dtype("u1"),
}  # fmt: skip
SAFETENSORS = {
    "F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": BFLOAT16, "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class WeightsError(ValueError):
    """A weights file that is not one, is damaged, or asks for something to be executed."""


class Inert:
    """What a module or record in a pickle becomes: its state, and nothing that acts."""

    state: dict[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        new = super().__new__(cls)
        new.state = {}
        return new

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"state": state}

    def __setitem__(self, key: Any, value: Any) -> None:  # of a subclass of dict
        self.state[key] = value


INERT = (
    "torch.nn.",
    "argparse.Namespace",
    "dnnlib.util.EasyDict",
    "pytorch_lightning.",
    "omegaconf.",
    "ml_collections.",
)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of a weights file under its dotted name ("model.enc.32x32_conv.weight"), as it is stored.

    WeightsError for a file that is no weights file (a git-lfs pointer, an HTML page, ..), that is damaged, or that
    would have to be executed to be read. FileNotFoundError as ever.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise WeightsError(f"{path} is an HTML page, not weights: the download needs another address, or a login")
    if not head:
        raise WeightsError(f"{path} is empty: the download did not finish")
    try:
        if zipfile.is_zipfile(path):
            found = _zip(path)
        elif path.suffix == ".safetensors" or head[8:9] == b"{":
            return _safetensors(path)
        else:
            with path.open("rb") as file:
                found = _legacy(file)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, AttributeError, TypeError, ValueError, struct.error,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise WeightsError(f"{path} is no weights file that can be read, or is damaged: {error}") from None
    return dict(arrays(found))


def arrays(tree: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(dotted name, array) of every array in nested containers; modules as `state_dict` would have them."""
    if isinstance(tree, np.ndarray):
        yield prefix.removesuffix("."), tree
    elif isinstance(tree, Inert):
        parts = [tree.state.get(key) for key in ("_parameters", "_buffers", "_modules")]
        for part in parts if any(isinstance(p, Mapping) for p in parts) else [tree.state]:
            yield from arrays(part, prefix)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from arrays(value, f"{prefix}{key}.")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from arrays(value, f"{prefix}{i}.")


# ------------------------------------------------------------------------------------------------ the three containers
def _safetensors(path: Path) -> dict[str, np.ndarray]:
    data = np.memmap(path, np.uint8, "r")  # read as it is used: files may be larger than memory
    (size,) = struct.unpack("<Q", bytes(data[:8]))
    if size > 2**27:
        raise ValueError("it does not begin as safetensors do")
    if 8 + size > len(data):
        raise WeightsError("the header is cut off: the download did not finish")
    found = {}
    for name, entry in json.loads(bytes(data[8 : 8 + size])).items():
        if name == "__metadata__":
            continue
        start, end = (8 + size + n for n in entry["data_offsets"])
        kind = np.dtype(SAFETENSORS[entry["dtype"]])
        if end > len(data) or end - start != kind.itemsize * math.prod(entry["shape"]):
            raise WeightsError(f"{name} is cut off: the download did not finish")
        found[name] = np.asarray(data[start:end]).view(kind).reshape(entry["shape"])
    return found


def _zip(path: Path) -> Any:
    """torch.save's format since 1.6: a pickle, and a file for each storage."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(f"a zip archive with {len(pickles)} files data.pkl; a PyTorch file has one")
        root = pickles[0].removesuffix("data.pkl")

        def storage(kind: np.dtype, key: str, count: int) -> np.ndarray:
            return np.frombuffer(archive.read(f"{root}data/{key}"), kind)

        return Reader(io.BytesIO(archive.read(pickles[0])), storage).load()


def _legacy(file: Any) -> Any:
    """torch.save's format before 1.6 (pickles, then storages), or one pickle that holds its storages, as EDM's."""
    waiting: dict[str, tuple[np.dtype, list[Any]]] = {}

    def storage(kind: np.dtype, key: str, count: int) -> np.ndarray:
        return waiting.setdefault(key, (kind, [np.zeros(count, kind)]))[1][0]

    first = Reader(file, storage).load()
    if first != LEGACY_MAGIC:
        return first
    for _ in range(2):  # version of the protocol, sizes of the writer's integers
        Reader(file, storage).load()
    found = Reader(file, storage).load()
    for key in Reader(file, storage).load():
        kind, (array,) = waiting[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != len(array):
            raise WeightsError(f"storage {key} has {count} entries; {len(array)} were announced")
        array[:] = np.frombuffer(file.read(count * kind.itemsize), kind)
    return found


# ------------------------------------------------------------------------------------------------------- the pickle
class Reader(pickle.Unpickler):
    """An unpickler that knows tensors and plain containers; `storage` gives the entries of a storage by its key."""

    def __init__(self, file: Any, storage: Callable[[np.dtype, str, int], np.ndarray]):
        super().__init__(file, encoding="latin1")
        self._storage = storage

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage: ("storage", kind, key, device, entries, ..)."""
        what, kind, key, _, count = pid[:5]
        if what != "storage" or not isinstance(kind, np.dtype):
            raise WeightsError(f"an unknown kind of entry, {what!r}")
        return self._storage(kind, str(key), int(count))

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in KNOWN:
            return KNOWN[full]
        if module in ("torch", "torch.storage") and name.endswith("Storage") and name[:-7] in KINDS:
            return KINDS[name[:-7]]
        if full.startswith(INERT):
            return Inert
        raise WeightsError(
            f"the file asks for {full}, which is no tensor and no plain container: nothing was executed. If you trust "
            "the file, save its state_dict() anew with PyTorch, or as safetensors"
        )


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A view of a storage; WeightsError where it would leave it."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (math.prod(size) and last >= len(storage)):
        raise WeightsError(f"a tensor {size} with strides {stride} at {offset} does not fit its {len(storage)} entries")
    bytes_of = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, bytes_of, writeable=False)


def _storage_of(data: bytes) -> Any:
    return _legacy(io.BytesIO(data))


def _typed(wrapped: Any, dtype: Any = None, *_: Any) -> Any:
    return wrapped


def _network(meta: Mapping[str, Any]) -> Inert:
    """EDM's networks: their state; `meta["module_src"]` is source code, and stays a string."""
    found = Inert()
    found.__setstate__(meta["state"])
    return found


def _dtype(name: Any, *_: Any) -> np.dtype:
    return np.dtype(name if isinstance(name, str) and name.lstrip("<>|=")[:1] in "fiub" else "V")


class _Kind:
    """A NumPy dtype in a pickle, whose byte order comes later."""

    def __init__(self, name: Any = "V", *_: Any):
        self.kind = _dtype(name)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.kind = self.kind.newbyteorder(state[1])


def _scalar(kind: Any, data: Any = b"") -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, kind.kind)[0].item() if kind.kind.kind != "V" else None


KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.storage._load_from_bytes": _storage_of,
    "torch.storage.TypedStorage": _typed,
    "torch.Size": tuple,
    "torch.device": lambda *_: None,
    "torch_utils.persistence._reconstruct_persistent_obj": _network,
    "numpy.dtype": _Kind,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": lambda text, *_: text.encode("latin1"),
    "builtins.set": set,
    "__builtin__.set": set,
}  # fmt: skip
"""What a pickle may name, and the harmless thing that it gets."""

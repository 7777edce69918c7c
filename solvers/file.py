"""A solver as a file: its arrays in safetensors, bit for bit, its record and what is known of it in the metadata."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.process import Process
from jdiff.tableau import Record, Tableau

ARRAYS = ("t", "A", "B", "C", "h0", "c0")


def save(path: str | os.PathLike, tableau: Tableau, meta: Mapping[str, Any] | None = None) -> None:
    """Write a tableau (float64 arrays, its record, its process) and `meta`, any JSON, to a .safetensors file."""
    from safetensors.numpy import save_file

    record = dataclasses.asdict(tableau.record) | {"process": _process_to(tableau.record.process)}
    named = (*ARRAYS, "E") if tableau.E is not None else ARRAYS
    arrays = {name: np.array(getattr(tableau, name), np.float64, order="C") for name in named}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    about = {"jdiff": "tableau", "record": json.dumps(record), "meta": json.dumps(dict(meta or {}))}
    save_file(arrays, temporary, about)
    temporary.replace(path)


def load(path: str | os.PathLike) -> Tableau:
    """The tableau that `save` wrote. FileNotFoundError, or ValueError for a file of something else."""
    record, arrays, _ = _read(path)
    names = tuple(tuple(row) for row in record["names"])
    tuples = {"labels": tuple(record["labels"]), "names": names, "references": tuple(record["references"])}
    fields: dict[str, Any] = record | tuples | {"process": _process_from(record["process"], path)}
    full = Record(**fields)
    return Tableau(**arrays, record=full).validate()


def metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `save` was told of the solver: model, sizes and seeds of the sets, errors on held-out noise."""
    return _read(path)[2]


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; write one with `jdiff fit-solver RUN --nfe 8 --out {path}`")
    try:
        with safe_open(path, "np") as f:
            about = f.metadata() or {}
            arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a solver: {error}") from None
    if about.get("jdiff") != "tableau":
        raise ValueError(f"{path} holds no solver; expected a file of `jdiff fit-solver` or jdiff.fit.save")
    return json.loads(about["record"]), arrays, json.loads(about["meta"])


def _process_to(p: Process) -> list[Any]:
    return [type(p).__name__, dataclasses.asdict(p)]


def _process_from(found: list[Any], path: Any) -> Process:
    name, fields = found
    for kind in _kinds(Process):
        if kind.__name__ == name:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return kind(**values)
    raise ValueError(f"{path} is for a process {name}, which is not defined here; import its class first")


def _kinds(base: type[Process]) -> Iterator[type[Process]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)

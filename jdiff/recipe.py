"""What to train and how: one dataclass, and the functions that make of it an optimizer, a loss, a net, a process."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import jdiff.process
from jdiff import ema, losses
from jdiff.denoiser import call_net, edm_precondition
from jdiff.process import Process, Time

if TYPE_CHECKING:
    import optax
    from flax import nnx


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how. Everything but the fields in `MAY_CHANGE` is fixed for the life of a run."""

    out: str = "runs/digits"  # folder of the run: checkpoints, snapshots, metrics
    data: str = "digits"  # data set: digits, tfds:NAME, or a folder or .zip of images in one folder a class
    split: str | None = None  # part of the data set; None: the training half of digits, train of tfds, all of a folder
    data_dir: str | None = None  # where tfds data sets lie prepared
    size: int | None = None  # resize images to size x size pixels; None: as they are
    net: str = "DiT-Ti/2"  # a name in jdiff.nets.PRESETS
    net_options: dict[str, int | float | bool | str] = field(default_factory=dict)  # win over the preset's
    labels: bool = True  # condition on the class, where the data set has classes
    label_dropout: float = 0.1  # share of samples trained without label, for classifier-free guidance
    process: str = "edm"  # vp_linear, vp_cosine, edm or flow
    process_options: dict[str, float] = field(default_factory=dict)  # arguments of the process
    prediction: Literal["x0", "eps", "v", "score", "velocity"] = "x0"  # what the network stands for
    precondition: bool | None = None  # EDM's preconditioning, x0 only; None: where prediction is x0 on edm
    weighting: Literal["none", "edm", "min_snr", "flow"] = "edm"  # weight of the loss at each time
    time: Literal["uniform", "logit_normal", "log_normal"] = "log_normal"  # distribution of training times
    time_mean: float | None = None  # mean of log(sigma/alpha) for the normal ones; None: the paper's
    time_std: float | None = None  # its standard deviation; None: the paper's
    stratified: bool = True  # times of a batch spread evenly (low discrepancy) instead of independent
    sigma_data: float = 0.5  # standard deviation of the images, for preconditioning and the edm weighting
    gamma: float = 5.0  # where the min_snr weighting cuts
    batch: int = 128  # images a step, over all devices
    steps: int = 2000  # how many steps in all
    optimizer: Literal["adamw", "adam", "lion", "sgd"] = "adamw"  # update rule, by optax
    learning_rate: float = 1e-3  # peak learning rate
    schedule: Literal["constant", "cosine"] = "cosine"  # after the warm-up: stay, or fall to 0 at `steps`
    warmup: int = 100  # steps over which the learning rate rises from 0
    weight_decay: float = 0.0  # decoupled decay (adamw and lion)
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    ema: tuple[float, ...] = ema.SIGMA_RELS  # lengths sigma_rel of the tracked averages (power-function profiles)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32
    seed: int = 0  # of the parameters, the batches and the noise
    mesh: str = ""  # devices an axis, such as data=2,fsdp=4 (axes data, fsdp, tensor, sequence); "": all on data
    checkpoint_every: int = 500  # steps between checkpoints
    keep: int = 2  # how many checkpoints stay on disk
    snapshot_every: int | None = None  # steps between snapshots of the averages; None: steps / 16
    log_every: int = 50  # steps between rows of metrics, and between looks for a non-finite loss
    tensorboard: bool = True  # write TensorBoard events beside metrics.csv


MAY_CHANGE = ("out", "mesh", "log_every", "checkpoint_every", "keep", "tensorboard")
"""Fields that a resumed run may change, and `steps`, to go on for longer, if the schedule is constant."""


def learning_rate(config: TrainConfig) -> Callable[[Any], Any]:
    """The schedule: step (from 0) -> learning rate."""
    import optax

    peak, rest = config.learning_rate, max(config.steps - config.warmup, 1)
    after = optax.constant_schedule(peak) if config.schedule == "constant" else optax.cosine_decay_schedule(peak, rest)
    if not config.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / config.warmup, peak, config.warmup), after], [config.warmup]
    )


OPTIMIZERS = ("adamw", "adam", "lion", "sgd")


def make_optimizer(config: TrainConfig) -> "optax.GradientTransformation":
    """Clipping, the update rule and the schedule that config names."""
    import optax

    schedule = learning_rate(config)
    options: dict[str, Any] = {"learning_rate": lambda count: jnp.asarray(schedule(count), jnp.float32)}
    if config.optimizer in ("adamw", "lion"):
        options["weight_decay"] = config.weight_decay
    if config.optimizer == "sgd":
        options["momentum"] = 0.9
    rule = getattr(optax, config.optimizer)(**options)
    return rule if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), rule)


@dataclass(frozen=True)
class NetCall:
    """A net's graph as a function (params, x, t, y=None) of arrays, preconditioned where sigma_data is given.

    Equal ones compare equal, so denoisers of the same net share one compilation.
    """

    graph: Any
    process: Process
    sigma_data: float | None = None

    def __call__(self, params: PyTree, x: Array, t: Time, y: PyTree | None = None) -> Array:
        from flax import nnx

        call = lambda params, x, t: call_net(nnx.merge(self.graph, params), x, t, y)
        if self.sigma_data is not None:
            call = edm_precondition(call, self.process, self.sigma_data)
        return call(params, x, t)


# ------------------------------------------------------------------------------------------------- from a config
def make_process(config: TrainConfig) -> Process:
    """The process that config names; ValueError for an unknown one or unknown options."""
    known = sorted(set(jdiff.process.ALL) - {"vp_discrete"})
    if config.process not in known:
        raise ValueError(f"unknown process {config.process!r}; expected one of {', '.join(known)}")
    try:
        return jdiff.process.ALL[config.process](**config.process_options)
    except TypeError as error:
        raise ValueError(f"process_options {dict(config.process_options)}: {error}") from error


def sigma_data_of(config: TrainConfig) -> float | None:
    """sigma_data where the network is preconditioned, else None. ValueError where it may not be."""
    wanted = config.precondition
    if wanted and config.prediction != "x0":
        raise ValueError(f"precondition=True makes the network predict x0, but prediction is {config.prediction!r}")
    on = (config.prediction == "x0" and config.process == "edm") if wanted is None else wanted
    return config.sigma_data if on else None


def make_loss(config: TrainConfig, call: NetCall, null_label: int | None) -> losses.Loss:
    """The loss that config names, of a net as a NetCall; null_label is None for a net without labels."""
    process = call.process
    normal = {"mean": config.time_mean, "std": config.time_std}
    options = {k: v for k, v in normal.items() if v is not None}
    if config.time not in losses.TIMES or (options and config.time == "uniform"):
        raise ValueError(
            f"time is {config.time!r} with {options}; expected one of {', '.join(losses.TIMES)}, "
            "time_mean and time_std for the normal ones only"
        )
    return losses.denoising_loss(
        call,
        process,
        config.prediction,
        weighting=config.weighting,
        time=losses.TIMES[config.time](process, **options),
        stratified=config.stratified,
        sigma_data=config.sigma_data,
        gamma=config.gamma,
        label_dropout=0.0 if null_label is None else config.label_dropout,
        null_label=null_label,
    )


def build_net(config: TrainConfig, dataset: Any, rngs: "nnx.Rngs") -> Any:
    """The net that config names, for the data set's images and classes; ValueError where they do not fit."""
    from jdiff import nets

    height, width, channels = dataset.shape
    if height != width:
        raise ValueError(f"{config.data} holds {height} x {width} images; nets take square ones: give `size`")
    classes = dataset.num_classes if config.labels and dataset.num_classes > 1 else 0
    fixed = {"image_size": height, "channels": channels, "num_classes": classes, "dtype": config.dtype}
    preset = nets.PRESETS[config.net].options if config.net in nets.PRESETS else {}
    if {**preset, **config.net_options}.get("context"):
        if not getattr(dataset, "text", 0):
            raise ValueError(f"{config.net} is told a text, and {config.data} has none: take a net that is told labels")
        del fixed["num_classes"]  # not both
    for name, value in config.net_options.items():
        if name in fixed and fixed[name] != value:
            raise ValueError(
                f"net_options: {name} is {value!r}, but the data set {config.data} (and `labels`, `dtype`) ask for "
                f"{fixed[name]!r}; leave it out, it follows from them"
            )
    return nets.build(config.net, rngs=rngs, **{**config.net_options, **fixed})


def check(config: TrainConfig) -> None:
    """ValueError for a number outside its range or an unknown name; other functions here check what they use."""
    for name in ("batch", "steps", "checkpoint_every", "keep", "log_every", "snapshot_every"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    for name, known in (("optimizer", OPTIMIZERS), ("schedule", ("constant", "cosine"))):
        if getattr(config, name) not in known:
            raise ValueError(f"unknown {name} {getattr(config, name)!r}; expected one of {', '.join(known)}")
    if not config.learning_rate > 0 or not (config.clip is None or config.clip > 0) or config.weight_decay < 0:
        raise ValueError(
            f"expected learning_rate > 0, clip > 0 or None, and weight_decay >= 0; got {config.learning_rate=}, "
            f"{config.clip=}, {config.weight_decay=}"
        )
    if not config.sigma_data > 0 or not config.gamma > 0:
        raise ValueError(f"expected sigma_data > 0 and gamma > 0, got {config.sigma_data=}, {config.gamma=}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is {config.seed}; expected 0 <= seed < 2^32")
    if not 0 <= config.warmup < config.steps:
        raise ValueError(f"warmup is {config.warmup}; expected 0 <= warmup < steps = {config.steps}")
    for sigma_rel in config.ema:
        ema.gamma_of_sigma_rel(sigma_rel)


def meta(config: TrainConfig, net: Any, dataset: Any) -> dict[str, Any]:
    import flax
    import optax
    import orbax.checkpoint

    versions = {m.__name__.split(".")[0]: m.__version__ for m in (jax, flax, optax, orbax.checkpoint, np)}
    return {
        "format": 1,
        "config": asdict(config),
        "net": dict(net.config),
        "process": [config.process, dict(config.process_options)],
        "prediction": config.prediction,
        "sigma_data": sigma_data_of(config),
        "ema": list(config.ema),
        "data": {
            "name": dataset.name,
            "shape": list(dataset.shape),
            "num_classes": dataset.num_classes,
            "n": len(dataset),
        },
        "key": np.asarray(jax.random.key_data(jax.random.key(config.seed))).tolist(),
        "versions": versions,
    }


def frozen(config: TrainConfig) -> dict[str, Any]:
    """What must stay the same when a run is resumed: fields of the configuration, and how random bits are made."""
    may = (*MAY_CHANGE, "steps") if config.schedule == "constant" else MAY_CHANGE
    random = {k: getattr(jax.config, k) for k in ("jax_default_prng_impl", "jax_threefry_partitionable")}
    return {k: v for k, v in asdict(config).items() if k not in may} | {"random": random}

"""DiT-XL/2 on latents of ImageNet 256 x 256, as a flow (SiT's linear path), over any mesh, on one machine or a pod.

    python -m jdiff.experiments.train_dit_imagenet --data-dir /data/tfds --out /shared/dit --mesh data=-1,fsdp=16

The data are prepared once: a TFDS set (ArrayRecord) with the features "latent", float (32, 32, 4), an autoencoder's,
scaled to a standard deviation of about 1, and "label": `jdiff encode` writes it. docs/pods.md has a pod's commands.

Settings are those of DiT and SiT (2212.09748, 2401.08740): AdamW without decay, constant 1e-4, batch 256, labels
dropped at 0.1; uniform times; 400,000 steps for their ablations, 7,000,000 for their best. Differences: a warm-up, no
flips, gradients clipped at norm 1, and averages of power-function profiles rather than one of 0.9999. Not run at this
size yet: no figure is claimed. Killed or preempted, the same command goes on; another mesh or number of hosts may.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jdiff.recipe import TrainConfig


@dataclass(frozen=True)
class Options:
    """DiT-XL/2 on latents of ImageNet."""

    out: str = "runs/dit-imagenet"  # folder of the run; all processes must see it
    data: str = "tfds:image_latents"  # set of latents, or one of images
    data_dir: str | None = None  # where TFDS sets lie prepared
    net: str = "DiT-XL/2"  # a name in `jdiff list nets`
    net_options: dict[str, int | float | bool | str] = field(default_factory=dict)  # win over the preset's
    remat: str = "full"  # what the backward pass computes again: none, full, dots
    batch: int = 256  # over all devices
    steps: int = 400_000
    warmup: int = 1000
    mesh: str = ""  # devices an axis, such as data=-1,fsdp=16; "": all on data
    processes: str = ""  # auto on a pod, or HOST:PORT,COUNT,INDEX; the same command on every host
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations
    checkpoint_every: int = 5000
    log_every: int = 100
    seed: int = 0
    plan: str = ""  # a topology, such as v5e:16x16: say what the run would need there, and train nothing


def configuration(o: Options) -> TrainConfig:
    """The run that the options ask for."""
    net_options = o.net_options | {"remat": o.remat}
    return TrainConfig(
        out=o.out, data=o.data, data_dir=o.data_dir, net=o.net, net_options=net_options, process="flow",
        prediction="velocity", weighting="flow", time="uniform", batch=o.batch, steps=o.steps, schedule="constant",
        learning_rate=1e-4, warmup=o.warmup, dtype=o.dtype, mesh=o.mesh, checkpoint_every=o.checkpoint_every,
        log_every=o.log_every, seed=o.seed, tensorboard=False,
    )  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    import tyro

    from jdiff import pod, train

    options = tyro.cli(Options, args=args, description=__doc__)
    if options.plan:
        from jdiff.plan import PlanConfig, report
        from jdiff.plan.command import plan

        same = {name: getattr(options, name) for name in ("net", "net_options", "remat", "mesh", "batch", "dtype")}
        print(report(plan(PlanConfig(topology=options.plan, **same))))
        return
    pod.start(options.processes)
    result = train.train(configuration(options))
    print(f"trained: {result.out}")


if __name__ == "__main__":
    main()

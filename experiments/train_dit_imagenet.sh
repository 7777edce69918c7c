#!/usr/bin/env bash
# DiT-XL/2 on ImageNet latents on a TPU pod: see docs/pods.md. Not run on a pod yet. The same call goes on with the run.
#   FILESTORE=10.0.0.2 experiments/train_dit_imagenet.sh
set -euo pipefail
: "${FILESTORE:?the address of a Filestore instance with a share /share: all hosts write checkpoints there}"
name=${NAME:-dit} zone=${ZONE:-us-west4-a} kind=${KIND:-v5litepod-256} version=${VERSION:-v2-alpha-tpuv5-lite}
topology=${TOPOLOGY:-v5e:16x16} mesh=${MESH:-data=16,fsdp=16} batch=${BATCH:-2048}
tpu() { gcloud compute tpus tpu-vm "$1" "$name" --zone "$zone" "${@:2}"; }

python -m jdiff.experiments.train_dit_imagenet --plan "$topology" --mesh "$mesh" --batch "$batch"
tpu describe > /dev/null 2>&1 || tpu create --accelerator-type "$kind" --version "$version"
tpu ssh --worker all --command "pip install -q 'jdiff[tpu]'"
tpu ssh --worker all --command "sudo mkdir -p /shared; mountpoint -q /shared || sudo mount $FILESTORE:/share /shared
  JAX_COMPILATION_CACHE_DIR=/shared/cache python -m jdiff.experiments.train_dit_imagenet --processes auto \
    --data-dir /shared/tfds --out /shared/dit --mesh $mesh --batch $batch"
echo "done; the pod is still there: gcloud compute tpus tpu-vm delete $name --zone $zone"

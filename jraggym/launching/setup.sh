#!/usr/bin/env bash
# Makes one worker of a TPU slice ready: bash setup.sh FOLDER [BUCKET]. What is there already stays as it is.
#
# FOLDER holds the project; it gets a virtual environment FOLDER/.venv with the project and JAX for TPUs. BUCKET is
# mounted as /bucket. The images of Cloud TPU VMs have an older Python than the project needs, so uv brings one.
set -euo pipefail
folder=$1
bucket=${2:-}

PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet 'uv>=0.5'
python3 -m uv venv --quiet --allow-existing --python 3.12 "$folder/.venv"
python3 -m uv pip install --quiet --python "$folder/.venv/bin/python" -e "$folder[offline]" 'jax[tpu]'

if [[ -n $bucket ]] && ! mountpoint --quiet /bucket; then
  if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  sudo mkdir -p /bucket
  sudo chown "$(id -u):$(id -g)" /bucket
  gcsfuse --implicit-dirs "$bucket" /bucket
fi

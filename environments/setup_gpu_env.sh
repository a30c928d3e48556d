#!/usr/bin/env bash
# Installs qvl into an environment that already has a CUDA build of torch, and leaves that torch alone.
#
#   bash environments/setup_gpu_env.sh                    # qvl
#   bash environments/setup_gpu_env.sh ray wandb          # with extras of pyproject.toml
#   PYTHON=/opt/conda/bin/python bash environments/setup_gpu_env.sh
#   bash environments/setup_gpu_env.sh --allow_cpu        # a CPU build of torch is good enough
#
# The installed torch and torchvision are constraints of the installation: a dependency that cannot live with them
# stops it before anything is changed. torch.__version__ and torch.version.cuda are compared before and after.
set -euo pipefail

python=${PYTHON:-python}
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "setup_gpu_env: $1" >&2
  exit 1
}

allow_cpu=false
extras=()
for argument in "$@"; do
  case $argument in
    --allow_cpu) allow_cpu=true ;;
    -*) fail "unknown option $argument; options: --allow_cpu, then names of extras" ;;
    *) extras+=("$argument") ;;
  esac
done

command -v "$python" > /dev/null || fail "no such Python: $python (choose one with PYTHON=...)"
torch_build() {
  "$python" -c 'import torch; print(torch.__version__, torch.version.cuda)'
}
before=$(torch_build) || fail "$python has no working torch; install the CUDA build for your driver first, see README.md"
if [[ $before == *" None" && $allow_cpu == false ]]; then
  fail "torch ${before% None} of $python is a CPU build; install the CUDA build for your driver, or add --allow_cpu"
fi

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
"$python" - > "$constraints" << 'PYTHON'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "torchvision"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
PYTHON

requirement=$project
if ((${#extras[@]})); then
  requirement+="[$(IFS=,; echo "${extras[*]}")]"
fi
"$python" -m pip install --disable-pip-version-check --constraint "$constraints" --editable "$requirement" \
  || fail "pip could not install qvl beside the constraints $(paste -sd ' ' "$constraints"); torch is untouched"

after=$(torch_build) || fail "torch no longer imports; before it was $before (version, CUDA)"
[[ $after == "$before" ]] || fail "torch changed from $before to $after (version, CUDA)"
echo "qvl is installed; torch is still $after (version, CUDA)."

#!/usr/bin/env bash
# One wheel, several torches: builds the wheel once and runs its op library, tests included, under each torch version given.
# The environments stay in build/torch-<version> (gigabytes each: plain PyPI builds of torch carry CUDA).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
[ $# -gt 0 ] || { echo "usage: torch_versions.sh VERSION..." >&2; exit 2; }
wheels=$PWD/build/wheels; rm -rf "$wheels"
"$python" -m pip wheel -q --no-deps -w "$wheels" .
wheel=$(ls "$wheels"/structadmm-*.whl)
sha256sum "$wheel" | cut -c1-16
for version in "$@"; do
  env=$PWD/build/torch-$version
  [ -x "$env/bin/python" ] || "$python" -m venv "$env"
  "$env/bin/python" -m pip install -q "torch==$version" numpy safetensors rich typer pytest hypothesis
  "$env/bin/python" -m pip install -q --no-deps --force-reinstall "$wheel"
  echo "torch $version:"
  "$env/bin/python" tests/install/smoke.py
  "$env/bin/python" -m pytest -q -x tests/test_projection_ops.py tests/test_compact_ops.py
done

#!/usr/bin/env bash
# Installs structadmm in fresh environments in the ways a user may, and runs the smoke test in each:
# `pip install .` with build isolation, `pip install --no-build-isolation .` against the user's own torch, and `pip wheel .`.
# Then examples/cpp is built against an installed package, as a C++ program finds it.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} torch=${TORCH:-torch==2.13.0}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

fresh() {  # a fresh environment that holds the user's torch
  "$python" -m venv "$work/$1"
  "$work/$1/bin/python" -m pip install -q --upgrade "pip>=24"
  "$work/$1/bin/python" -m pip install -q "$torch" numpy
}
smoke() { (cd "$work" && "$work/$1/bin/python" "$OLDPWD/tests/install/smoke.py"); }

echo "pip install . (build isolation)"
fresh isolated; "$work/isolated/bin/python" -m pip install -q .; smoke isolated
echo "pip install --no-build-isolation . (the user's own torch)"
fresh own; "$work/own/bin/python" -m pip install -q scikit-build-core pybind11 nlohmann-json cmake ninja
"$work/own/bin/python" -m pip install -q --no-build-isolation .; smoke own
echo "pip wheel ."
"$work/own/bin/python" -m pip wheel -q --no-deps -w "$work/wheels" .; ls "$work/wheels"
echo "examples/cpp against the installed package"
prefix=$(cd "$work" && "$work/own/bin/python" -c "import structadmm, os; print(os.path.dirname(structadmm.__file__))")
"$work/own/bin/cmake" -S examples/cpp -B "$work/example" -DCMAKE_PREFIX_PATH="$prefix" >/dev/null
"$work/own/bin/cmake" --build "$work/example" >/dev/null
(cd "$work" && env -i PATH="$PATH" ./example/classify missing missing 2>&1 | grep -q "wanted an artefact")
echo "all installs passed"

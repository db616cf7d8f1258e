#!/bin/sh
# Makes a throw-away environment with fairchem-core, and the answers of its EScAIP for the tests of imported models.
#
#   sh benchmarks/fairchem/make_reference.sh ENVIRONMENT OUT [committed|small|realistic]
#   ESCAIP_FAIRCHEM_REFERENCE=OUT pytest tests/interop
#
# ENVIRONMENT is a folder, made where it does not exist yet; OUT is a folder of numbers. What is in tests/interop/data was
# made with "committed". Some minutes the first time, then half a minute.
set -eu
environment=${1:?usage: make_reference.sh ENVIRONMENT OUT [committed|small|realistic]}
out=${2:?usage: make_reference.sh ENVIRONMENT OUT [committed|small|realistic]}
size=${3:-small}
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -x "$environment/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
fi
if ! "$environment/bin/python" -c "import fairchem.core.models.escaip" 2>/dev/null; then
    # torch first and pinned, so that fairchem-core pulls no other: a build without CUDA where pip finds one.
    "$environment/bin/pip" install --quiet torch==2.13.0
    "$environment/bin/pip" install --quiet fairchem-core==2.24.0
fi
"$environment/bin/python" "$here/reference.py" --out "$out" --size "$size"
if [ "$size" != realistic ]; then
    "$environment/bin/python" "$here/reference_checkpoints.py" --out "$out"
fi

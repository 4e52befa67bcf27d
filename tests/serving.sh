#!/usr/bin/env bash
# Runs what we write in the engines that people serve with: bash tests/serving.sh llama.cpp [pytest arguments]
# Apart from the main suite, as it installs an engine of its own into .serving/.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
engine="${1:-}"
if [ "$engine" != llama.cpp ]; then
    echo "bash tests/serving.sh llama.cpp: no other engine is tested yet" >&2
    exit 2
fi
shift
source common/setup_environment.sh requirements.txt tests/requirements.txt || exit $?
# A package that ships llama.cpp as one shared library, called through its C interface (benchmarks/llama_cpp.py).
if [ ! -d .serving/llama.cpp/xllamacpp ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target .serving/llama.cpp \
        xllamacpp==2026.10.11549 || exit $?
fi
exec "$PYTHON" -m pytest -m "slow or not slow" tests/serving/test_llama_cpp.py "$@"

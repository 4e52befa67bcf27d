#!/usr/bin/env bash
# Sets the environment up and runs the tests: bash tests/run.sh [pytest arguments]; `-m slow` runs the long ones.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
source common/setup_environment.sh requirements.txt tests/requirements.txt || exit $?
# The authors' HQQ, an oracle. In a folder of its own: transformers imports it wherever it finds it, which takes seconds.
# DISABLE_CUDA keeps it from compiling.
if [ ! -d .venv/oracle/hqq ]; then
    DISABLE_CUDA=1 "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/oracle \
        hqq==0.2.8.post1 einops termcolor || echo "the hqq package cannot be installed; its tests are skipped" >&2
fi
# Three files at a time, as tests wait for processes and disks in between; half of the cores each;
# the longest first (conftest.py).
cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores > 1 ? cores / 2 : 1 ))}"
# Where it is set, as in many containers, each of a dozen processes compiles this project's files anew.
unset PYTHONDONTWRITEBYTECODE
exec "$PYTHON" -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests "$@"

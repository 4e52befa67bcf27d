#!/usr/bin/env bash
# Sets the environment up and runs the tests: bash tests/run.sh [pytest arguments]; `-m slow` runs the long ones.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export DISABLE_CUDA=1
source common/setup_environment.sh requirements.txt tests/requirements.txt || exit $?
exec "$PYTHON" -m pytest -c tests/pytest.ini tests "$@"

#!/usr/bin/env bash
# Form and types of the code: bash tests/lint.sh. Rules are in pyproject.toml; `ruff format` and
# `ruff check --fix` mend most of what is found.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup_environment.sh requirements.txt tests/requirements.txt
python=("$PYTHON" -m)
"${python[@]}" ruff check .
"${python[@]}" ruff format --check --quiet .
"${python[@]}" mypy

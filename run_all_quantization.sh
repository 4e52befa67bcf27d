#!/usr/bin/env bash
# The whole comparison: baseline, every configuration quantized, verified and evaluated, README's tables regenerated.
#
#     bash run_all_quantization.sh --demo              the embedded model, no hub access needed
#     bash run_all_quantization.sh                     meta-llama/Llama-3.2-1B-Instruct
#     bash run_all_quantization.sh --with-peers        other libraries beside our methods, in an environment of their own
#     bash run_all_quantization.sh --check             what on this machine would stop or slow a run
#     bash run_all_quantization.sh --help              all options; what is not listed there goes to the evaluation or the method scripts
set -u
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
source common/setup_environment.sh requirements.txt || exit $?
exec "$PYTHON" -m common.batch "$@"

#!/usr/bin/env python3
"""Write a checkpoint as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

    python common/gguf_export.py --model-path models/Llama-3.2-1B-Instruct/gptq-4bit
    python common/gguf_export.py --model-path models/X/gptq-4bit --output X-gptq-4bit.gguf

The codes are the checkpoint's own, nothing is rounded a second time: 4 bits with zero-points become
blocks of Q4_1, without Q4_0, and 8 bits Q8_0. Scales are 16-bit floats there, one for each 32
weights, so groups of 64 or 128 take more room than in the checkpoint. What the file cannot say
(activations of 8 bits, 2 and 3 bits, 8 bits with zero-points) is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Started as a script: `common` is a folder of the project's, not of this one.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from common.base.arguments import Parser
from common.base.progress import say
from common.cli import run
from common.exporting.gguf_file import check_file, export, file_beside


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--output", type=Path, help="the file (default: the folder's name with .gguf, beside it)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    options = parser.parse_args()
    file = options.output or file_beside(options.model_path.resolve())
    check_file(file, options.overwrite)
    say(str(export(options.model_path, file)))


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""Verify a quantized checkpoint: complete, loads plainly, codes and scales in order, the recorded
logits reproduced.

    python verify_model.py --model-path models/Llama-3.2-1B-Instruct/gptq-4bit
    python verify_model.py --model-path models/Llama-3.2-1B-Instruct/gptq-4bit --push-to-hub me/mine

Exit code 0 when no check fails, 1 when one does, 2 when the folder is no checkpoint of the quantize
scripts. Checks that need metadata are skipped for a checkpoint without; the last line says so.
"""

import argparse
from pathlib import Path

from common import cli
from common.base.arguments import Parser
from common.base.device import device_and_dtype
from common.base.progress import say
from common.checkpoint.publish import check_publishing, publish
from common.reporting.card import ensure_card
from common.verification import verify

MARKS = {True: "PASS", False: "FAIL", None: "SKIP"}


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="when no check fails, upload the folder and its model card to this repository of the "
        "hub, which is made, private, if it is not there",
    )
    cli.add_device_arguments(parser)
    options = parser.parse_args()
    if options.push_to_hub is not None:
        check_publishing(options.push_to_hub)
    device, dtype = device_and_dtype(options)
    cli.configure_torch(seed=0)
    failed, skipped = False, []
    for check in verify(options.model_path, device, dtype):
        say(f"{MARKS[check.passed]}  {check.name}: {check.detail}")
        failed |= check.passed is False
        skipped += [check.name] if check.passed is None else []
    passed = (
        f"not fully verified, skipped without metadata: {', '.join(skipped)}"
        if skipped
        else "verified"
    )
    say(f"{options.model_path}: {'verification failed' if failed else passed}")
    if options.push_to_hub and failed:
        say(f"not uploaded to {options.push_to_hub}: a check failed")
    elif options.push_to_hub:
        ensure_card(options.model_path)
        publish(options.model_path, options.push_to_hub)
    return int(failed)


if __name__ == "__main__":
    cli.run(main)

#!/usr/bin/env python3
"""The same model with other channels, so that no group is a block of a 4-bit file.

    python benchmarks/shuffled_model.py models/other/baseline models/other-shuffled/baseline

Models that come from a GGUF file of 4 bits lie on that file's grid: blocks of 32 neighbours share a
scale and, in Q4_1 and Q4_K, a real offset. A grid whose groups are whole blocks, and whose
zero-points are real as those offsets, finds it again, and loses less on such a model than on any
that was never rounded. Channels of the hidden state and of the MLP are drawn in another order here,
and groups hold neighbours of many blocks; those of a value head, which may all be in one group, are
turned against each other as well. The function stays (`common/model/channels.py`). The demo model
is made so already.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from made_models import check_new, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import cli
from common.model.channels import shuffle
from common.model.source import load_config, resolve_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="hub id, folder or demo")
    parser.add_argument("output", type=Path, help="folder of the checkpoint that is written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    check_new(options.output)
    folder = resolve_folder(options.model)
    load_config(folder)  # refuses what is no model of a family, or quantized already
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    shuffle(model, options.seed)
    save_model(model, AutoTokenizer.from_pretrained(folder), options.output)


if __name__ == "__main__":
    cli.run(main)

"""What transformers 4 reads in another form than transformers 5 writes it."""

from __future__ import annotations

import json
from pathlib import Path

from common.base.files import load_json


def old_rope(config: dict) -> dict:
    """The rotary embedding of a config.json in the form that transformers 4 reads; without it 4.57
    takes its defaults and says nothing. transformers 5 reads both forms.
    """
    scaling = dict(config["rope_parameters"])
    old = {}
    if "full_attention" in scaling:  # one form for each type of layer
        old["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
        scaling = dict(scaling["full_attention"])
    theta, kind = scaling.pop("rope_theta"), scaling["rope_type"]
    # Where a part of each head is turned, a field of its own says so, and a scaling's are counted.
    if "partial_rotary_factor" in scaling:
        old["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
        if kind == "longrope":
            factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
            scaling = {"type": kind, **factors}
    return {**old, "rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}


def name_tokenizer_as_before(file: Path) -> None:
    """Give the class and the special tokens in a tokenizer_config.json the names that transformers
    4 and 5 both know.
    """
    config = load_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False))

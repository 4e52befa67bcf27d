"""A tiny random Llama with the fields, tokenizer form and template of Llama-3.2-1B-Instruct."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from stub_data import text

# Its chat template in other words: BOS, a system turn that tells the date, then the turns.
TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
  {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
  {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
  {%- set told = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set told = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge until December 2023\\n" }}
{{- "Today: " + date_string + "\\n\\n" }}
{{- told + "<|eot_id|>" }}
{%- for message in messages %}
  {{- "<|start_header_id|>" + message['role'] + "<|end_header_id|>\\n\\n" }}
  {{- message['content'] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}"""
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_VOCABULARY = 640


def llama_tokenizer():
    """Byte pairs learnt from made-up text, special tokens last, BOS before every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text(random.Random(3), 200)], trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    start = tokenizer.token_to_id(SPECIAL[0])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{SPECIAL[0]} $A",
                pair=f"{SPECIAL[0]} $A {SPECIAL[0]}:1 $B:1",
                special_tokens=[(SPECIAL[0], start)],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token="<|eot_id|>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=131072,
        clean_up_tokenization_spaces=True,
        chat_template=TEMPLATE,
    )


def write_llama(folder: Path) -> None:
    """The repository's files, with Meta's own form of the weights beside."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = llama_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    ends = [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": ends,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        **sizes,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.normal_(0, 0.08)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # As the repository has them: the fields of that time, not those that this transformers writes.
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps(
            {
                "bos_token_id": ids["<|begin_of_text|>"],
                "do_sample": True,
                "eos_token_id": ends,
                "temperature": 0.6,
                "top_p": 0.9,
                "transformers_version": "4.45.0.dev0",
            },
            indent=2,
        )
    )
    (folder / "original").mkdir()
    (folder / "original/consolidated.00.pth").write_bytes(b"weights again" * 30_000)
    (folder / "original/params.json").write_text("{}")

"""The configurations that other libraries quantize, for comparison: what
`run_all_quantization.sh --with-peers` runs and tables show. Who calls which library how is in
benchmarks/peers.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """title, kind: as the table of status shows them. package: as it is installed. bits: of a
    weight. grouped: whether --group-size is its. calibrated: whether it reads text.
    """

    title: str
    kind: str
    package: str
    bits: int = 4
    grouped: bool = True
    calibrated: bool = True


_WEIGHTS, _NO_DATA = "weights, calibrated", "weights, no data"
PEERS = {
    "rtn-4bit": Peer("Round to nearest", _NO_DATA, "llmcompressor", calibrated=False),
    "llmcompressor-gptq-4bit": Peer("GPTQ of llm-compressor", _WEIGHTS, "llmcompressor"),
    "llmcompressor-awq-4bit": Peer("AWQ of llm-compressor", _WEIGHTS, "llmcompressor"),
    "llmcompressor-smoothquant-8bit": Peer(
        "SmoothQuant + GPTQ of llm-compressor",
        "weights and activations, calibrated",
        "llmcompressor",
        bits=8,
        grouped=False,
    ),
    "hqq-package-4bit": Peer("HQQ of hqq", _NO_DATA, "hqq", calibrated=False),
    "autoround-4bit": Peer("AutoRound, 200 iterations", _WEIGHTS, "auto-round"),
    "gptqmodel-gptq-4bit": Peer("GPTQ of GPTQModel, by optimum", _WEIGHTS, "gptqmodel"),
    "bitsandbytes-nf4": Peer(
        "NF4 of bitsandbytes", _NO_DATA, "bitsandbytes", grouped=False, calibrated=False
    ),
}

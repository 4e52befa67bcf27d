"""What vLLM makes of checkpoints, one after the other; test_vllm.py starts it in vLLM's own
environment.

Writes a line of JSON about this machine, {"avx512", "vnni"}: whether the CPU has these units.
Then reads a line for each checkpoint:

    {"folder", "dtype", "prompts": [[token id, ...], ...], "all": whether the log-probabilities of
     all tokens are wanted or the prompts' own, "new": how many tokens to generate greedily,
     "stand_in": whether the products below take the place of vLLM's with rounded weights}

and writes one:

    {"kernels": [class that holds rounded weights, ...], "generated": [[token id, ...], ...],
     "log_probabilities": of each prompt, of each token but the first, [vocabulary] or [1]}

or {"refused": the error}. Every checkpoint is loaded in a forked process: vLLM is imported once,
and nothing that one leaves behind reaches the next.
"""

import json
import os
import sys
import traceback

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, where the stand-ins are
    VLLM_CPU_INT4_W4A8="0",  # or, where there is AMX, activations are rounded for 4-bit weights
)
# Others write to standard output, too; it is theirs, as standard error.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear import CPUInt8ScaledMMLinearKernel
from vllm.platforms import current_platform

SCHEMA = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, "
    "Tensor? zeros, Tensor? bias, SymInt pack_factor, str isa_hint) -> ()"
)
# Output channels that vLLM stores side by side, and 4-bit codes in an int32.
BLOCK, CODES = 16, 8
library = torch.library.Library("_C", "FRAGMENT")
unpacked: dict = {}  # weights [in, out] that were multiplied by before


def codes_of(packed):
    """The eight unsigned codes of each int32, lowest bits first: [..., n] -> [..., 8 n]."""
    return ((packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15).flatten(-2)


def product_of_4_bits(input, q_weight, output, scales, zeros, bias, pack_factor, isa_hint):
    """Stands in for vLLM's product and reads the weight as vLLM laid it out for that.

    Args:
        input: [tokens, in].
        q_weight: int32 [out / 16, in * 2]: for every input channel the 16 codes of a block's output
            channels.
        output: [tokens, out], written to.
        scales: [groups, out].
        zeros: int32 [groups, out / 8], or None where codes are centred on 8.
        bias: [out] or None.
    """
    place = q_weight.data_ptr()  # a parameter's, and a process holds one model
    if place not in unpacked:
        groups, rows = scales.shape
        blocks = q_weight.view(rows // BLOCK, -1, BLOCK // CODES)
        codes = codes_of(blocks).permute(1, 0, 2).reshape(groups, -1, rows)
        centre = 8 if zeros is None else codes_of(zeros).unsqueeze(1)
        unpacked[place] = ((codes - centre).to(scales.dtype) * scales.unsqueeze(1)).flatten(0, 1)
    result = input @ unpacked[place]
    output.copy_(result if bias is None else result + bias)


def product_of_8_bits(kernel, layer, x, bias=None):
    """Stands in for CPUInt8ScaledMMLinearKernel.apply_weights, without rounding activations.

    Args:
        layer: holds weight, int8 [out, in], and weight_scale [out, 1].
        x: [tokens, in].
        bias: [out] or None.
    """
    weight = layer.weight.to(x.dtype) * layer.weight_scale.to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def stand_in() -> None:
    """Gives the products above to vLLM."""
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        library.define(SCHEMA)
    library.impl("cpu_gemm_wna16", product_of_4_bits, "CPU", allow_override=True)
    CPUInt8ScaledMMLinearKernel.process_weights_after_loading = lambda kernel, layer: None
    CPUInt8ScaledMMLinearKernel.apply_weights = product_of_8_bits


def kernels(model) -> list[str]:
    """The classes that hold a model's rounded weights."""
    schemes = [getattr(module, "scheme", None) for module in model.modules()]
    return sorted({type(scheme.kernel).__name__ for scheme in schemes if scheme is not None})


def answer(request: dict) -> dict:
    """What a checkpoint gives, as the module says."""
    if request["stand_in"]:
        stand_in()
    try:
        model = LLM(
            request["folder"],
            dtype=request["dtype"],
            enforce_eager=True,
            max_model_len=max(map(len, request["prompts"])) + request["new"],
            max_num_seqs=4,
            kv_cache_memory_bytes=2**28,
            max_logprobs=-1,
            enable_prefix_caching=False,
        )
        outputs = model.generate(
            [{"prompt_token_ids": prompt} for prompt in request["prompts"]],
            SamplingParams(
                max_tokens=request["new"],
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                prompt_logprobs=-1 if request["all"] else 0,
            ),
            use_tqdm=False,
        )
        names = model.apply_model(kernels)[0]
    except Exception as error:
        traceback.print_exc()
        return {"refused": f"{type(error).__name__}: {error}"}
    return {
        "kernels": names,
        "generated": [list(output.outputs[0].token_ids) for output in outputs],
        "log_probabilities": [
            [[place[token].logprob for token in sorted(place)] for place in out.prompt_logprobs[1:]]
            for out in outputs
        ],
    }


def say(message: dict) -> None:
    print(json.dumps(message), file=answers, flush=True)


def main() -> None:
    say({"avx512": torch.cpu._is_avx512_supported(), "vnni": torch.cpu._is_vnni_supported()})
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            say(answer(json.loads(line)))
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            say({"refused": "the process ended"})


if __name__ == "__main__":
    main()

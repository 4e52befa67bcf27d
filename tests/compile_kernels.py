"""Compile every Triton kernel for compute capability 9.0; needs no card. The interpreter lets pass what the compiler refuses."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from common.kernels import inference_triton, products_triton, rounding_triton  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
HALF, FULL, FLOAT, WORD, BYTE, SIGNED, LONG = "*bf16", "*fp16", "*fp32", "*i32", "*u8", "*i8", "*i64"
# Pointers by argument name; what is not here is a 32-bit integer, or a float where FLOATS says so.
POINTERS = {"inputs": HALF, "packed": BYTE, "scale": HALF, "zero_point": SIGNED, "output": HALF, "partial": FLOAT,
            "weight": HALF, "hidden": HALF, "input_scale": HALF, "codes": SIGNED, "gate": HALF, "up": HALF, "update": HALF,
            "gain": HALF, "projected": HALF, "cosine": HALF, "sine": HALF, "query_gain": HALF, "key_gain": HALF,
            "positions": LONG, "keys": HALF, "values": HALF, "counters": WORD, "best": FLOAT, "index": WORD, "result": LONG}
FLOATS = {"epsilon", "scaling", "smallest", "strength", "beta", "rate"}
ROUNDING = {name: FLOAT for name in ("target", "shifted", "factor", "scale", "zero_point", "error", "weight", "importance",
                                     "candidates", "v", "low", "product", "unit", "moment", "variance", "difference")}
ROUNDING["codes"] = SIGNED
# Programmatic launches are for compute capability 9.0 and later.
OVERLAP = {"OVERLAP": True}
PACKED = [({"BITS": bits, "HAS_ZERO": zero}, {"packed": BYTE if bits == 4 else SIGNED, "inputs": inputs})
          for bits, zero, inputs in ((4, True, HALF), (4, False, FULL), (8, True, FULL), (8, False, HALF))]
BYTES = {"inputs": SIGNED, "packed": SIGNED}
CASES = [
    *[("_matmul", {**form, **OVERLAP, "BLOCK_ROWS": 32, "BLOCK_OUT": 64, "BLOCK": block, "SPLITS": splits}, pointers)
      for form, pointers in PACKED for block, splits in ((32, 1), (128, 4))],
    *[("_matvec", {**OVERLAP, "BITS": bits, "INPUT_BITS": input_bits, "HAS_ZERO": zero, "HAS_NORM": norm, "GATED": gated,
                   "ADDED": added, "EARLY": norm or added, "PIECE": 16, "BLOCK_OUT": 16, "PIECES": 16, "ASSEMBLY": True},
       {"packed": WORD})
      for bits, input_bits, zero, norm, gated, added in (
          (4, 0, True, False, False, False), (4, 0, False, True, True, False), (4, 0, True, False, False, True),
          (8, 0, False, True, False, False), (8, 8, False, True, True, False), (8, 8, False, False, False, True))],
    *[("_integer_matmul", {**OVERLAP, "BLOCK_ROWS": 16, "BLOCK_OUT": 64, "BLOCK": block, "SPLITS": splits}, BYTES)
      for block, splits in ((32, 1), (128, 4))],
    *[("_unpack", {**form, **OVERLAP, "PIECE": 128, "BLOCK": 2048}, pointers) for form, pointers in PACKED],
    ("_round_rows", {**OVERLAP, "BITS": 8, "BLOCK": 2048}, {}),
    *[("_add_rms_norm", {**OVERLAP, "HAS_UPDATE": True, "BITS": bits, "BLOCK": 2048}, {"output": SIGNED if bits else HALF})
      for bits in (0, 8)],
    ("_rotate_heads", {**OVERLAP, "HALF": 32, "BLOCK": 1024}, {"heads": HALF}),
    *[("_silu_mul", {**OVERLAP, "BITS": bits, "BLOCK": 1024}, {"output": SIGNED if bits else HALF}) for bits in (0, 8)],
    *[("_attend", {"KEY_HEADS": 8, "HEADS_PER_KEY": 4, "BLOCK_HEADS": 16, "SIZE": 64, "HAS_NORMS": norms, "SPLITS": splits,
                   "SPLIT": 512, "BLOCK": 64, **OVERLAP}, {}) for norms in (False, True) for splits in (1, 4)],
    ("_largest_in_part", {**OVERLAP, "BLOCK": 2048}, {}), ("_largest_of_parts", {**OVERLAP, "BLOCK": 64}, {}),
    ("_round_block", {"CODE_MIN": -8, "CODE_MAX": 7, "BLOCK_ROWS": 8, "BLOCK_CHANNELS": 128}, ROUNDING),
    *[("_search_range", {"STORED": stored, "HAS_IMPORTANCE": weighted, "FOURTH": not weighted,
                         "SYMMETRIC": symmetric, "BITS": 4, "BLOCK_GROUPS": 16, "BLOCK_SIZE": 128}, ROUNDING)
      for weighted in (False, True) for symmetric in (False, True)
      for stored in (rounding_triton.tl.bfloat16, rounding_triton.tl.float16)],
    *[("_learning_step", {"HAS_BETA": beta, "CODE_MIN": -8, "CODE_MAX": 7, "BLOCK": 1024}, ROUNDING) for beta in (False, True)],
]


def compile_kernel(name: str, constants: dict, pointers: dict) -> None:
    modules = inference_triton, products_triton, rounding_triton
    kernel = next(getattr(module, name) for module in modules if hasattr(module, name))
    types = {**POINTERS, **pointers}
    signature = {}
    for parameter in inspect.signature(kernel.fn).parameters:
        if parameter in constants:
            signature[parameter] = "constexpr"
        else:
            signature[parameter] = types.get(parameter, "fp32" if parameter in FLOATS else "i32")
    triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=TARGET,
                   options={"launch_pdl": bool(constants.get("OVERLAP"))})


if __name__ == "__main__":
    failed = 0
    for name, constants, pointers in CASES:
        try:
            compile_kernel(name, constants, pointers)
        except Exception as error:  # whatever the compiler raises, the others are still worth a try
            failed += 1
            print(f"{name} {constants}: {type(error).__name__} {error}")
    print(f"{len(CASES) - failed} of {len(CASES)} compiled")
    sys.exit(bool(failed))

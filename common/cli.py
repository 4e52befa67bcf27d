"""The arguments that scripts share, and how an error ends a script: one clear line and exit
code 2."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from common.base import interrupts
from common.base.arguments import (
    DEFAULT_MODEL,
    Parser,
    gibibytes,
    not_negative,
    positive,
    share,
    two_or_more,
)
from common.base.device import DTYPES, resolve_device
from common.base.environment import is_required, missing
from common.base.errors import UserError
from common.solvers.rounding import CATCH_UP
from common.text import windows


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and end the process: 0 or what main returns; 2 with one line for what the
    user can mend.
    """
    quiet_libraries()
    try:
        interrupts.raise_again()
        code = main() or 0
    except UserError as error:
        code = fail(str(error))
    except torch.cuda.OutOfMemoryError:
        code = fail(
            "the GPU ran out of memory; lower --calib-length or --calib-samples, raise "
            "--device-memory if you set it, close other programs on the GPU, or use --device cpu"
        )
    except ModuleNotFoundError as error:
        if not is_required(error.name):  # a module of ours, or of a library that is there
            raise
        code = fail(missing(str(error.name)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        code = fail(
            f"cannot write {error.filename or 'the output'}: {error.strerror}; free some space or "
            "choose another folder"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = interrupts.CODE
    sys.stdout.flush()
    sys.exit(code)


def fail(message: str) -> int:
    """Print `message` as one error line. Returns the exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def quiet_libraries() -> None:
    """Keep the libraries' own notices and bars off the screen; ours say what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "httpx", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from loguru import logger

        logger.disable("compressed_tensors")
    except ImportError:
        pass
    # The library offers no switch for the bars it shows while loading and decompressing.
    import compressed_tensors.offload.dispatch as dispatch
    from compressed_tensors.compressors.model_compressors import model_compressor
    from compressed_tensors.quantization.lifecycle import apply

    dispatch.tqdm = model_compressor.tqdm = apply.tqdm = lambda items, **_: items


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --device-memory, --dtype, --data-root."""
    add_model(parser)
    add_device_arguments(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="hub id, folder, or demo (default: %(default)s)"
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """--device, --device-memory, --dtype, --data-root."""
    add_place(parser)
    parser.add_argument(
        "--device-memory",
        type=gibibytes,
        metavar="GIB",
        help="GPU memory that the process may take, its CUDA context included (default: what is "
        "free when it starts)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="type to compute in; auto is float32 on a CPU, bfloat16 on CUDA, and "
        "float16 on GPUs before compute capability 8.0 (RTX 20)",
    )


def add_place(parser: argparse.ArgumentParser) -> None:
    """--device, --data-root."""
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="where to compute; auto takes CUDA when there is one",
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="look for data sets as DIR/<owner>/<name>/<config>/<split>.parquet before the hub",
    )


def quantization_parser(description: str, bits: int) -> argparse.ArgumentParser:
    """A parser with the arguments of every quantize script; `bits` is the method's default
    width."""
    # A method may say anew, after these, what it takes of an option.
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--bits", type=int, default=bits, help="bits per weight (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help="checkpoint folder (default: models/<model>/<method>-<bits>bit)"
    )
    add_group_size(parser)
    zero_points = parser.add_mutually_exclusive_group()
    zero_points.add_argument(
        "--symmetric",
        action="store_const",
        const=True,
        help="no zero-points: codes are centred on zero (the default at 8 bits)",
    )
    zero_points.add_argument(
        "--asymmetric",
        dest="symmetric",
        action="store_const",
        const=False,
        help="a zero-point for each group (the default below 8 bits)",
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=(4, 8),
        help="round the head too, if it is not the embedding's own matrix (default: 16-bit)",
    )
    parser.add_argument(
        "--embedding-bits",
        type=int,
        choices=(8,),
        help="round the embedding too, and with it a head that shares its matrix (default: 16-bit)",
    )
    add_calibration_arguments(parser)
    parser.add_argument(
        "--save-metadata",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write quantization_metadata.json into the checkpoint",
    )
    parser.add_argument(
        "--gguf",
        action="store_true",
        help="write the checkpoint for llama.cpp too, as one file beside its folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with what an interrupted run of the same command left; the result is the same, "
        "bit for bit",
    )
    return parser


def add_group_size(parser: argparse.ArgumentParser) -> None:
    """--group-size."""
    parser.add_argument(
        "--group-size",
        type=_group_size,
        default="auto",
        metavar="N|auto|channel",
        help="input channels that share a scale; auto is the largest of 128, 64, 32 that divides "
        "all linears, channel one scale per output channel",
    )


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """--calib-data, --calib-samples, --calib-length, --seed."""
    parser.add_argument(
        "--calib-data",
        metavar="DATA",
        help="calibration text: a data set (owner/name[/config][:split]), a .txt, .jsonl or "
        f".parquet file, or demo (default: {windows.DEFAULT_DATA}; demo for the demo model)",
    )
    parser.add_argument(
        "--calib-samples",
        type=positive,
        metavar="N",
        help=f"calibration windows (default: {windows.DEFAULT_SAMPLES}; {windows.DEMO_SAMPLES} "
        "with demo text)",
    )
    parser.add_argument(
        "--calib-length",
        type=two_or_more,
        metavar="N",
        help=f"tokens per window, cut to the model's context (default: {windows.DEFAULT_LENGTH}; "
        f"{windows.DEMO_LENGTH} with demo text)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the calibration sample (default: %(default)s)"
    )


def add_catch_up(parser: argparse.ArgumentParser) -> None:
    """--catch-up, for the methods that walk through the quantized layers with Gram matrices."""
    parser.add_argument(
        "--catch-up",
        type=share,
        default=CATCH_UP,
        metavar="SHARE",
        help="share of the quantized layers' accumulated error that each layer is made to recover; "
        "0 spares a second pass (default: %(default)s)",
    )


# Steps of --tune-scales by bits, 0 for others: the fewer bits, the more scales have to gain.
TUNE_STEPS = {2: 64, 3: 64, 4: 32}


def add_tune_scales(parser: argparse.ArgumentParser) -> None:
    """--tune-scales, for the same methods."""
    defaults = ", ".join(f"{steps} with {bits} bits" for bits, steps in TUNE_STEPS.items())
    parser.add_argument(
        "--tune-scales",
        type=not_negative,
        metavar="STEPS",
        help="gradient steps in which the scales of the whole model are tuned, at the end, on the "
        "divergence of what it says from what the original model says; 0 leaves them (default: "
        f"{defaults}, else 0; 0 on a CPU and with demo text)",
    )


def resolve_tuning(options: argparse.Namespace, rounds_online: bool = False) -> None:
    """Fill in --tune-scales and, as it depends on them, the calibration options that were left out.

    Args:
        rounds_online: activations or the cache are rounded as the model runs.
    Raises:
        UserError: --tune-scales is given although there is such rounding.
    """
    resolve_sizes(options)
    if rounds_online:
        if options.tune_scales:
            raise UserError(
                "--tune-scales needs gradients, and rounding as the model runs has none; "
                "leave it out with --act-bits and --kv-bits"
            )
        options.tune_scales = 0
    if options.tune_scales is None:
        slow = options.calib_data == "demo" or resolve_device(options.device).type == "cpu"
        options.tune_scales = 0 if slow else TUNE_STEPS.get(options.bits, 0)


def resolve_sizes(options: argparse.Namespace) -> None:
    """Fill in the calibration options that were left out; they depend on whether it is the demo."""
    if options.calib_data is None:
        options.calib_data = "demo" if options.model == "demo" else windows.DEFAULT_DATA
    demo = options.calib_data == "demo"
    options.calib_samples = options.calib_samples or (
        windows.DEMO_SAMPLES if demo else windows.DEFAULT_SAMPLES
    )
    options.calib_length = options.calib_length or (
        windows.DEMO_LENGTH if demo else windows.DEFAULT_LENGTH
    )


def configure_torch(seed: int) -> None:
    """Seed everything and let CUDA use tf32 for float32 products."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True


def _group_size(text: str) -> str:
    if text not in ("auto", "channel") and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a number of channels, auto nor channel"
        )
    return text

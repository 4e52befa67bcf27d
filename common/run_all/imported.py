"""What the scripts import, for a process to be forked from. Nothing here uses a GPU or threads:
neither outlasts a fork.
"""

import atexit
import gc
import signal

# Until all is imported Ctrl-C ends this process without a word, unless it is ignored anyway; then
# the fork server ignores it.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
gc.disable()  # to look for garbage takes a tenth of the time, and imports leave little

import lm_eval.evaluator  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipelines  # noqa: F401

from common import cli, evaluation, quantization, verification  # noqa: F401
from common.results import hashes
from common.running import packed  # noqa: F401
from common.tasks import language_model  # noqa: F401

# It looks for modules of the libraries, and imports them.
cli.quiet_libraries()
# Remembered, with what each module comes to: the code is what was imported, and no fork reads it.
hashes.code_hash()

# All of it stays: no fork looks through it for garbage, which would also copy its memory.
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # or Triton would say at the end that it is not taken down

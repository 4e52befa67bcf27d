"""Checkpoints loaded by transformers alone, in processes that know nothing of this project: forks
of one that has imported transformers, so that each load does not import it anew.

As a script it is that process: it reads a line of JSON for each load from one file and writes the
exit code to another.
"""

import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch


class PlainLoader:
    """The process, for a session of tests."""

    def __init__(self):
        from forks import forks

        with tempfile.TemporaryDirectory() as folder:
            pipes = [str(Path(folder, name)) for name in ("asked", "answers")]
            for pipe in pipes:
                os.mkfifo(pipe)
            forks().start([str(Path(__file__).resolve()), *pipes], Path("/"), dict(os.environ))
            self._asked, self._answers = open(pipes[0], "w"), open(pipes[1])

    def __call__(self, folder: Path, tokens: torch.Tensor, scratch: Path, dtype="float32") -> dict:
        """What plain transformers makes of a checkpoint: logits of `tokens`, the linears' weights,
        whether embedding and head are tied, the chat template.
        """
        torch.save(tokens, scratch / "tokens.pt")
        words = [str(folder), dtype, str(scratch)]
        print(json.dumps(words), file=self._asked, flush=True)
        assert self._answers.readline() == "0\n", (scratch / "error").read_text()
        return torch.load(scratch / "loaded.pt")

    def close(self) -> None:
        self._asked.close()
        self._answers.close()


def load(folder: str, dtype: str, scratch: Path) -> None:
    """In the fork."""
    os.chdir(scratch)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.load("tokens.pt")).logits
    assert not any(name.split(".")[0] == "common" for name in sys.modules)
    found = {
        "logits": logits,
        "tied": model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(),
        "weights": {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if name.endswith("_proj.weight")
        },
        "template": tokenizer.chat_template,
    }
    torch.save(found, "loaded.pt")


def serve(asked: str, answers: str) -> None:
    # All that a load imports, or each fork would import it anew.
    from compressed_tensors.compressors.model_compressors import model_compressor  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.quantizers import quantizer_compressed_tensors  # noqa: F401

    sys.path.pop(0)
    gc.freeze()  # or each fork would go over what all of them have
    lines, out = open(asked), open(answers, "w")
    for line in lines:
        folder, dtype, scratch = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                load(folder, dtype, Path(scratch))
                code = 0
            except BaseException:
                Path(scratch, "error").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=out, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])

"""The model as lm-eval's task engine sees it: log-likelihoods and greedy answers, batched, shared
prefixes once.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor
from transformers import DynamicCache

from common.base.device_memory import available, halved_to_fit
from common.base.progress import track
from common.kernels.inference import largest_index
from common.model.memory import (
    TOKENS_SHARE,
    cache_bytes,
    logits_at_once,
    token_bytes,
    tokens_at_once,
)
from common.running.decoding import STEPS_AT_ONCE, Decoder, cache_after, decodes_faster
from common.tasks.batching import batches, common_prefix, cut_at_stops, row_length, tree_mask
from common.text import chat
from common.text.probe import check_finite, overflow

# Tokens in one batch of questions, and answers that are generated at once.
SCORING_TOKENS = {"cpu": 2048, "cuda": 16384}
GENERATION_BATCH = {"cpu": 32, "cuda": 128}
# Positions whose logits are computed at once: slices of this size lose no time.
LOGITS_POSITIONS = {"cpu": 256, "cuda": 1024}
# Share of what this process has left of a GPU that the cache of generated answers may take.
CACHE_SHARE = 0.4
# What overflows, in an error.
ANSWERS = "answers: the last layer or the head"


class HarnessModel(TemplateLM):
    """A causal LM and its tokenizer behind lm-eval's interface.

    All choices of one question are scored in one row: they follow the question side by side, and a
    mask keeps them from seeing each other. Prompts that start alike are generated from one shared
    prefix.
    """

    def __init__(self, model, tokenizer, batch_share: float = 1.0):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self._device = next(model.parameters()).device
        self.batch_size = max(1, int(batch_share * GENERATION_BATCH[self._device.type]))
        self.scoring_tokens = int(batch_share * SCORING_TOKENS[self._device.type])

    # --- what lm-eval asks about the model
    # --------------------------------------------------------------------------

    @property
    def device(self):
        return self._device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict], add_generation_prompt: bool = True
    ) -> str:
        return chat.render(self.tokenizer, chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            # A chat template writes the BOS token itself.
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("perplexity is measured by common.tasks.perplexity")

    # --- scoring choices
    # --------------------------------------------------------------------------------------------

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        questions: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, _) in enumerate(requests):
            questions[tuple(context)].append(index)
        rows = [
            (list(context), [requests[i][2] for i in indices], indices)
            for context, indices in questions.items()
        ]
        if self._slides(max(map(row_length, rows), default=0)):
            rows = [
                (context, [choice], [i])
                for context, choices, indices in rows
                for choice, i in zip(choices, indices, strict=True)
            ]
        rows.sort(key=lambda row: -row_length(row))  # longest first: memory shows at once
        answers: list = [None] * len(requests)
        tokens = tokens_at_once(
            self.scoring_tokens, self.model.config, self._element(), self._device
        )
        for batch in track(batches(rows, tokens), "choices", unit="batches"):
            for row, scored in zip(batch, self._score_rows(batch), strict=True):
                for index, value in zip(row[2], scored, strict=True):
                    answers[index] = value
        return answers

    def _score_rows(self, rows) -> list[list[tuple[float, bool]]]:
        """(log-likelihood, is greedy) of each choice of each row (context ids, [choice ids],
        ...)."""
        length = max(map(row_length, rows))
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        positions = torch.zeros(len(rows), length, dtype=torch.long)
        branch = torch.full((len(rows), length), -1)  # 0: question, 1..: choices, -1: padding
        sources, targets, owners = [], [], []
        for r, (context, choices, *_) in enumerate(rows):
            end = len(context)
            tokens[r, :end] = torch.tensor(context)
            positions[r, :end] = torch.arange(end)
            branch[r, :end] = 0
            for c, choice in enumerate(choices, start=1):
                span = slice(end, end + len(choice))
                tokens[r, span] = torch.tensor(choice)
                positions[r, span] = torch.arange(len(context), len(context) + len(choice))
                branch[r, span] = c
                before = [len(context) - 1, *range(end, end + len(choice) - 1)]
                sources += [(r, position) for position in before]
                targets += choice
                owners += [(r, c - 1)] * len(choice)
                end += len(choice)
        mask = (branch >= 0).long() if self._slides(length) else tree_mask(branch)
        hidden = self._hidden(tokens, positions, mask)
        row_index, column = torch.tensor(sources, device=self._device).unbind(1)
        scores, greedy = self._scores(
            hidden[row_index, column], torch.tensor(targets, device=self._device)
        )
        sums = [[0.0 for _ in choices] for _, choices, *_ in rows]
        all_greedy = [[True for _ in choices] for _, choices, *_ in rows]
        for (r, c), score, hit in zip(owners, scores, greedy, strict=True):
            sums[r][c] += score
            all_greedy[r][c] &= hit
        return [list(zip(*row, strict=True)) for row in zip(sums, all_greedy, strict=True)]

    def _scores(self, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
        """Log-likelihood of each target [positions] after hidden [positions, size], and whether it
        is the most likely token.
        """
        scores, greedy = [], []
        size = logits_at_once(
            LOGITS_POSITIONS[self._device.type], self.model.config.vocab_size, self._device
        )
        for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            logits = self.model.lm_head(part).float()
            found = torch.log_softmax(logits, -1).gather(1, wanted.unsqueeze(1)).squeeze(1)
            check_finite(found, "a question's choices", part.dtype)
            scores += found.tolist()
            greedy += (logits.argmax(-1) == wanted).tolist()
        return scores, greedy

    def _slides(self, length: int) -> bool:
        """Whether a text of `length` tokens is longer than a sliding window of the model's. Where
        choices lie side by side, or padding between prefix and prompt, the window would end at
        wrong tokens.
        """
        window = getattr(self.model.config, "sliding_window", None)
        return window is not None and length > window

    def _element(self) -> int:
        """Bytes of a number in the model's activations."""
        return self.model.model.norm.weight.element_size()

    def _hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self.model.model(
            tokens.to(self._device),
            position_ids=positions.to(self._device),
            attention_mask=mask.to(self._device),
            use_cache=False,
        ).last_hidden_state

    # --- generating answers
    # -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        settings = requests[0].args[1]
        until, max_new = list(settings.get("until") or []), settings["max_gen_toks"]
        length = len(prompts[order[0]]) + max_new + STEPS_AT_ONCE
        prefix = 0 if self._slides(length) else common_prefix(prompts)
        shared = self._prefix_cache(prompts[0][:prefix]) if prefix else None
        answers: list[str] = [""] * len(requests)
        decoder, size = None, self._rows_that_fit(length)
        if decodes_faster(self.model, length):
            decoder = Decoder(self.model, size, length)
        else:
            row = (len(prompts[order[0]]) - prefix) * token_bytes(
                self.model.config, self._element()
            )
            size = halved_to_fit(size, row, TOKENS_SHARE * available(self._device))
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        for batch in track(batches, "answers", unit="batches"):
            rest = [prompts[i][prefix:] for i in batch]
            if decoder:
                texts = self._decode(decoder, rest, shared, until, max_new)
            else:
                texts = self._generate(rest, prefix, shared, until, max_new)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
        return answers

    def _rows_that_fit(self, length: int) -> int:
        """The batch size, halved until the device has room for its cache."""
        row = length * cache_bytes(self.model, self._element())
        return halved_to_fit(self.batch_size, row, CACHE_SHARE * available(self._device))

    def _decode(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        shared: DynamicCache | None,
        until: list[str],
        max_new: int,
    ) -> list[str]:
        """As `_generate`, on a card: several steps between two looks at what was written."""
        logits = decoder.start(prompts, shared)
        check_finite(logits.amax(1), ANSWERS, logits.dtype)
        stops = self._stop_tokens()
        written: list[list[int]] = [[] for _ in prompts]
        slots: list[int | None] = list(range(len(prompts)))  # which prompt is in which row
        new = [decoder.tokens[: len(prompts)].tolist()]
        while True:
            for row, sample in enumerate(slots):
                if sample is not None and self._take(
                    written[sample], [step[row] for step in new], stops, until, max_new
                ):
                    slots[row] = None
            going = [row for row, sample in enumerate(slots) if sample is not None]
            if not going:
                break
            rows = len(slots)
            if 2 * len(going) <= rows:  # answers that ended leave the batch
                decoder.keep(going)
                slots = [slots[row] for row in going]
                rows = len(going)
            # Few batch sizes, as each is captured once.
            rows = min(1 << (rows - 1).bit_length(), decoder.rows)
            slots += [None] * (rows - len(slots))
            new = decoder.run(rows).tolist()
        return [
            cut_at_stops(self.tokenizer.decode(ids, skip_special_tokens=True), until)
            for ids in written
        ]

    def _take(
        self, written: list[int], new: list[int], stops: set[int], until: list[str], max_new: int
    ) -> bool:
        """Add new tokens to an answer. Returns whether it has ended."""
        for token in new:
            if token in stops or len(written) >= max_new:
                return True
            self._check(token)
            written.append(token)
        return len(written) >= max_new or bool(until) and self._stopped(written, until)

    def _check(self, token: int) -> None:
        """Raises UserError where a token follows from logits that are not finite."""
        if token < 0:
            raise overflow(ANSWERS, self.model.model.norm.weight.dtype)

    def _prefix_cache(self, tokens: list[int]) -> DynamicCache:
        cache = DynamicCache()
        self.model.model(
            torch.tensor([tokens], device=self._device), past_key_values=cache, use_cache=True
        )
        return cache

    def _generate(
        self,
        prompts: list[list[int]],
        prefix: int,
        shared: DynamicCache | None,
        until: list[str],
        max_new: int,
    ) -> list[str]:
        """Greedy answers to prompts that all follow `prefix` tokens in the cache `shared`; cut
        before a stop string.
        """
        length = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.ones(len(prompts), prefix + length, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # left padding, between prefix and prompt
            tokens[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, prefix : prefix + length - len(prompt)] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, prefix:]
        cache = cache_after(shared, len(prompts))
        tokens, mask, positions = (t.to(self._device) for t in (tokens, mask, positions))
        stops = self._stop_tokens()
        written: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for _ in range(max_new):
            hidden = self.model.model(
                tokens,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            chosen = largest_index(self.model.lm_head(hidden))
            going = []
            for row, (sample, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
                self._check(token)
                if token in stops:
                    continue
                written[sample].append(token)
                if not (until and self._stopped(written[sample], until)):
                    going.append(row)
            if not going:
                break
            if len(going) < len(active):  # answers that ended leave the batch
                keep = torch.tensor(going, device=self._device)
                cache.batch_select_indices(keep)
                chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
                active = [active[row] for row in going]
            tokens = chosen.unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        return [cut_at_stops(text, until) for text in texts]

    def _stopped(self, written: list[int], until: list[str]) -> bool:
        # A stop string may span tokens, so a few of the last ones are looked at together.
        tail = self.tokenizer.decode(written[-8 - STEPS_AT_ONCE :], skip_special_tokens=True)
        return any(stop in tail for stop in until)

    def _stop_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}

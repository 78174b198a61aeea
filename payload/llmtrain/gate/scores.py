"""Scores of a model on a held-out set: greedy answers, likelihoods of choices and texts, and latency.

The content of questions and answers is neither printed nor stored; messages name a row by its number.
"""

import math
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from llmtrain.exits import UNHEALTHY, Refusal
from llmtrain.gate.held_out import Asked

# Han, Kana and other scripts without spaces: each character counts as a word.
UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


@dataclass
class Subject:
    """A loaded model with its tokenizer. `side` is OLD or NEW."""

    side: str
    model: Any
    tokenizer: Any

    def prompt(self, row: Asked) -> list[int]:
        """The row's tokens, by the model's chat template if it has one, else those of the plain question."""
        if not self.tokenizer.chat_template:
            if row.question is None:
                raise Refusal(
                    f"row {row.number} has messages, but {self.side} has no chat template: use rows with a question"
                )
            return list(self.tokenizer(row.question).input_ids)
        text = self.tokenizer.apply_chat_template(row.turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @property
    def padding(self) -> int:
        """The token to pad with; it is masked, so any will do."""
        return int(self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0)

    def fits(self, row: Asked, tokens: int) -> None:
        """Raise Refusal if `tokens` exceed the model's context."""
        most = self.model.config.max_position_embeddings
        if tokens > most:
            raise Refusal(
                f"row {row.number} has {tokens} tokens, but {self.side}'s context is {most}: shorten it, or remove it"
            )

    def answers(
        self, rows: Sequence[Asked], max_tokens: int, batch: int, progress: Callable[[int], None]
    ) -> list[str]:
        """The greedy answer to each row."""
        prompts = [self.prompt(row) for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            self.fits(row, len(prompt) + max_tokens)
        answers = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda number: len(prompts[number]))  # for little padding
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            longest = max(len(prompts[number]) for number in chosen)
            padded = [[self.padding] * (longest - len(prompts[n])) + prompts[n] for n in chosen]
            mask = [[0] * (longest - len(prompts[n])) + [1] * len(prompts[n]) for n in chosen]
            for number, tokens in zip(chosen, self.generated(padded, mask, max_tokens), strict=True):
                answers[number] = self.tokenizer.decode(tokens, skip_special_tokens=True)
            progress(begin + len(chosen))
        return answers

    def generated(
        self, ids: list[list[int]], mask: list[list[int]], tokens: int, exactly: bool = False
    ) -> list[list[int]]:
        """Greedy tokens after each prompt, padded to one length; with `exactly`, stop tokens do not end an answer."""
        device = self.model.device
        inputs = torch.tensor(ids, device=device)
        outputs = self.model.generate(
            inputs,
            attention_mask=torch.tensor(mask, device=device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            min_new_tokens=tokens if exactly else None,
            pad_token_id=self.padding,
        )
        return [list(map(int, row)) for row in outputs[:, inputs.shape[1] :].tolist()]

    def choices(self, row: Asked) -> list[float]:
        """The log-likelihood of each choice after the row's prompt, in nats."""
        prompt = self.prompt(row)
        blank = "" if self.tokenizer.chat_template else " "
        endings = [
            list(self.tokenizer(blank + choice, add_special_tokens=False).input_ids) for choice in row.choices
        ]
        longest = len(prompt) + max(map(len, endings))
        self.fits(row, longest)
        wholes = [prompt + ending for ending in endings]
        device = self.model.device
        ids = torch.tensor([each + [self.padding] * (longest - len(each)) for each in wholes], device=device)
        mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in wholes], device=device)
        with torch.inference_mode():
            logits = self.model(ids, attention_mask=mask).logits[:, len(prompt) - 1 : -1].float()
        nats = cross_entropy(logits.transpose(1, 2), ids[:, len(prompt) :], reduction="none")
        return [-float(nats[number, : len(each)].sum()) for number, each in enumerate(endings)]

    def bits(self, text: str, context: int) -> tuple[float, int]:
        """The information content of `text` under the model in bits, and the number of predicted tokens.

        The text is split into pieces of `context` tokens; each token but the first is predicted once.
        """
        ids = torch.tensor(list(self.tokenizer(text).input_ids), device=self.model.device)
        context = min(context, self.model.config.max_position_embeddings)
        nats = 0.0
        for begin in range(0, len(ids) - 1, context - 1):
            window = ids[begin : begin + context]
            with torch.inference_mode():
                logits = self.model(window[None]).logits[0, :-1].float()
            nats += float(cross_entropy(logits, window[1:], reduction="sum"))
        return nats / math.log(2), max(0, len(ids) - 1)

    def seconds(self, prompt: list[int], tokens: int) -> float:
        """Seconds for an answer of exactly `tokens` tokens."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.generated([prompt], [[1] * len(prompt)], tokens, exactly=True)
        return time.perf_counter() - begin  # by then the tokens are on the host


def weights(directory: Path, dtype: str) -> Any:
    """Load a verified model from its safetensors; dtype "auto" is the stored one."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    ).eval()


def whole(directory: Path, adapter: Path | None, dtype: str) -> Any:
    """Load a model with an adapter merged in float32, then rounded once, each tensor to its stored dtype or to `dtype`.

    Raises ConfigError for an adapter that does not fit the model.
    """
    model = weights(directory, dtype)
    if adapter is None:
        return model
    from llmcore.adapters import merged

    sums = dict(merged(weights(directory, "float32"), adapter).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(sums.pop(name))
    if sums:
        raise Refusal(
            f"{adapter} has weights of its own, such as {min(sums)}: only LoRA on the model's layers is supported"
        )
    return model


def load(side: str, directory: Path, adapter: Path | None, dtype: str) -> Subject:
    """Load a verified model, with its adapter merged as by `llm-train publish`; raises Refusal if its logits are NaN."""
    set_verbosity_error()  # or transformers warns about sampling options, which are not used
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    model = whole(directory, adapter, dtype)
    if torch.cuda.is_available():
        model = model.cuda()
    with torch.inference_mode():
        logits = model(torch.arange(min(64, model.config.vocab_size), device=model.device)[None]).logits
    if not torch.isfinite(logits).all():
        raise Refusal(f"{side}'s logits are NaN: {adapter or directory} is broken, train it again", UNHEALTHY)
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    own.eos_token_id = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None}) or None
    own.temperature = own.top_p = own.top_k = None  # greedy
    return Subject(side, model, tokenizer)


def exact(answer: str, reference: str) -> float:
    """1 if the texts are equal, apart from whitespace and Unicode normalization, else 0."""
    return float(flat(answer) == flat(reference))


def flat(text: str) -> str:
    """The text in NFKC, with runs of whitespace as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def words(text: str) -> list[str]:
    """The units of F1: lower-case words, and single characters of scripts without spaces."""
    return re.findall(r"\w+", UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text)).casefold())


def f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of words, as in SQuAD (Rajpurkar et al. 2016) but with articles."""
    got, expected = Counter(words(answer)), Counter(words(reference))
    if not got or not expected:
        return exact(answer, reference)
    common = sum((got & expected).values())
    return 2 * common / (got.total() + expected.total())


def chosen(nats: list[float], row: Asked) -> tuple[float, float]:
    """1 if the correct choice is the most likely, else 0: by likelihood, and by likelihood per byte. NaN if any is NaN."""
    if not all(map(math.isfinite, nats)):
        return math.nan, math.nan
    lengths = [max(1, len(choice.encode())) for choice in row.choices]
    normalised = [each / length for each, length in zip(nats, lengths, strict=True)]
    return float(nats.index(max(nats)) == row.right), float(normalised.index(max(normalised)) == row.right)

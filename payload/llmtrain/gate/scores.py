"""What a model says to a held-out set: greedy answers, likelihoods of choices and of texts, and how long it takes.

Nothing of a question or an answer is printed or kept; a message names a row by its number.
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

# Han, Kana and their like: writing without blanks, of which each sign counts as a word.
UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


@dataclass
class Subject:
    """A model with its tokenizer, ready to be asked. `side` is OLD or NEW."""

    side: str
    model: Any
    tokenizer: Any

    def prompt(self, row: Asked) -> list[int]:
        """The row's tokens: by the model's chat template where it has one, else the question as it is."""
        if not self.tokenizer.chat_template:
            if row.question is None:
                raise Refusal(
                    f"row {row.number} has messages, and {self.side} has no chat template: give rows with a question"
                )
            return list(self.tokenizer(row.question).input_ids)
        text = self.tokenizer.apply_chat_template(row.turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @property
    def padding(self) -> int:
        """Any token: it is masked."""
        return int(self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0)

    def fits(self, row: Asked, tokens: int) -> None:
        """Raise Refusal where a row is longer than the model can see."""
        most = self.model.config.max_position_embeddings
        if tokens > most:
            raise Refusal(
                f"row {row.number} comes to {tokens} tokens, and {self.side} sees {most}: shorten it, or take it out"
            )

    def answers(
        self, rows: Sequence[Asked], max_tokens: int, batch: int, told: Callable[[int], None]
    ) -> list[str]:
        """The greedy answer to each row."""
        prompts = [self.prompt(row) for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            self.fits(row, len(prompt) + max_tokens)
        said = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda number: len(prompts[number]))  # little padding
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            longest = max(len(prompts[number]) for number in chosen)
            padded = [[self.padding] * (longest - len(prompts[n])) + prompts[n] for n in chosen]
            mask = [[0] * (longest - len(prompts[n])) + [1] * len(prompts[n]) for n in chosen]
            for number, tokens in zip(chosen, self.generated(padded, mask, max_tokens), strict=True):
                said[number] = self.tokenizer.decode(tokens, skip_special_tokens=True)
            told(begin + len(chosen))
        return said

    def generated(
        self, ids: list[list[int]], mask: list[list[int]], tokens: int, exactly: bool = False
    ) -> list[list[int]]:
        """Greedy tokens after each prompt, all of one length; `exactly` so many, whatever they are."""
        device = self.model.device
        given = torch.tensor(ids, device=device)
        made = self.model.generate(
            given,
            attention_mask=torch.tensor(mask, device=device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            min_new_tokens=tokens if exactly else None,
            pad_token_id=self.padding,
        )
        return [list(map(int, row)) for row in made[:, given.shape[1] :].tolist()]

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
            said = self.model(ids, attention_mask=mask).logits[:, len(prompt) - 1 : -1].float()
        nats = cross_entropy(said.transpose(1, 2), ids[:, len(prompt) :], reduction="none")
        return [-float(nats[number, : len(each)].sum()) for number, each in enumerate(endings)]

    def bits(self, text: str, context: int) -> tuple[float, int]:
        """What it takes the model to write `text`, in bits, and the tokens that it predicted.

        Seen `context` tokens at a time, each but the first predicted once.
        """
        ids = torch.tensor(list(self.tokenizer(text).input_ids), device=self.model.device)
        context = min(context, self.model.config.max_position_embeddings)
        nats = 0.0
        for begin in range(0, len(ids) - 1, context - 1):
            window = ids[begin : begin + context]
            with torch.inference_mode():
                said = self.model(window[None]).logits[0, :-1].float()
            nats += float(cross_entropy(said, window[1:], reduction="sum"))
        return nats / math.log(2), max(0, len(ids) - 1)

    def seconds(self, prompt: list[int], tokens: int) -> float:
        """How long an answer of exactly so many tokens takes."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.generated([prompt], [[1] * len(prompt)], tokens, exactly=True)
        return time.perf_counter() - begin  # the tokens are on the host by then


def weights(directory: Path, dtype: str) -> Any:
    """A verified model from its safetensors; dtype auto is the one that they have."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        local_files_only=True,
        use_safetensors=True,
    ).eval()


def whole(directory: Path, adapter: Path | None, dtype: str) -> Any:
    """A model with an adapter added to its weights: in float32, then rounded once, each tensor to the dtype that it has.

    Raises ConfigError for an adapter that does not work in it.
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
            f"{adapter} has weights of its own, such as {min(sums)}: only LoRA on the model's layers is taken"
        )
    return model


def load(side: str, directory: Path, adapter: Path | None, dtype: str) -> Subject:
    """Load a verified model, with its adapter as `llm-train publish` adds it; raises Refusal where its logits are no numbers."""
    set_verbosity_error()  # it advises about options of sampling, which nobody asked for
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    model = whole(directory, adapter, dtype)
    if torch.cuda.is_available():
        model = model.cuda()
    with torch.inference_mode():
        said = model(torch.arange(min(64, model.config.vocab_size), device=model.device)[None]).logits
    if not torch.isfinite(said).all():
        raise Refusal(
            f"{side}'s logits are no numbers: {adapter or directory} is broken, train it again", UNHEALTHY
        )
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    own.eos_token_id = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None}) or None
    own.temperature = own.top_p = own.top_k = None  # greedy
    return Subject(side, model, tokenizer)


def exact(said: str, wanted: str) -> float:
    """1 where the two are the same text, blanks and Unicode's forms apart."""
    return float(flat(said) == flat(wanted))


def flat(text: str) -> str:
    """Compatible forms made one, runs of blanks made one."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def words(text: str) -> list[str]:
    """Of what F1 counts: words without case, and single signs of writing without blanks."""
    return re.findall(r"\w+", UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text)).casefold())


def f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words, as SQuAD has it (Rajpurkar et al. 2016), articles kept."""
    got, expected = Counter(words(said)), Counter(words(wanted))
    if not got or not expected:
        return exact(said, wanted)
    common = sum((got & expected).values())
    return 2 * common / (got.total() + expected.total())


def chosen(nats: list[float], row: Asked) -> tuple[float, float]:
    """1 where the right choice is the likeliest: by its likelihood, and by that divided by its bytes. NaN for no numbers."""
    if not all(map(math.isfinite, nats)):
        return math.nan, math.nan
    lengths = [max(1, len(choice.encode())) for choice in row.choices]
    normalised = [each / length for each, length in zip(nats, lengths, strict=True)]
    return float(nats.index(max(nats)) == row.right), float(normalised.index(max(normalised)) == row.right)

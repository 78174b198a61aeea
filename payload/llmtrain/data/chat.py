"""Tokenizes conversations by the tokenizer's chat template, and marks the tokens of the assistant's turns.

The turns are located exactly, or the template is refused. `{% generation %}` marks are used if the template has them.
Otherwise the conversation is rendered up to each turn with and without the answer; the difference is the turn. The token that
ends a turn is learned, too, or a model would never stop (TRL #1623, DeepSeek-Coder #163).
"""

from typing import Any

from llmtrain.exits import Refusal

Span = tuple[int, int]


class NotLearnable(ValueError):
    """A conversation cannot be rendered, or has nothing to learn; the arguments are rule and reason."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


class Chat:
    """Renders conversations for one tokenizer."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        if not tokenizer.chat_template:
            raise Refusal(
                f"{name} has no chat template, but the data contains conversations: use the tokenizer of an instruct model, or "
                f"plain texts"
            )
        if not tokenizer.is_fast:
            raise Refusal(f"{name} has no tokenizer.json: turns cannot be located in its tokens")
        added = tokenizer.added_tokens_decoder.items()
        self.special = {number for number, token in added if token.special} | {tokenizer.eos_token_id}
        self.check()

    def render(self, messages: list[dict[str, str]], ask: bool = False) -> str:
        """Render by the template; raises NotLearnable if the template refuses the conversation."""
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise NotLearnable("template", f"the chat template refuses it: {type(error).__name__}") from error
        return text

    def spans(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """The rendered conversation, and the character ranges of the assistant's turns in it."""
        whole = self.render(messages)
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], ask=True) if number else ""
            after = self.render(messages[: number + 1])
            if not number or not after.startswith(before) or not whole.startswith(after):
                raise NotLearnable(
                    "turns", "the template renders an assistant's turn differently from its generation prompt"
                )
            if message["content"].strip() not in whole[len(before) : len(after)]:
                raise NotLearnable("changed_turn", "the template changes the assistant's text")
            spans.append((len(before), len(after)))
        return whole, spans

    def check(self) -> None:
        """Raise Refusal for a template whose turns cannot be located, before it rejects every document."""
        conversation = [
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": "So."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Thus."},
        ]
        try:
            ids, learned = self.tokens(conversation)
        except NotLearnable as error:
            raise Refusal(
                f"the chat template of {self.name} cannot be trained on: {error}; "
                "use another template, or one with {% generation %} marks"
            ) from error
        text = self.tokenizer.decode(
            [i for i, yes in zip(ids, learned, strict=True) if yes], skip_special_tokens=True
        )
        if "".join(text.split()) != "So.Thus.":
            raise Refusal(
                f"the chat template of {self.name} cannot be trained on: for 'So.' and 'Thus.' it marks {text!r} as learned; "
                "use another template, or correct its {% generation %} marks"
            )

    def tokens(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids, and whether each is learned; raises NotLearnable."""
        if not any(message["role"] == "assistant" for message in messages):
            raise NotLearnable("no_answer", "there is no assistant turn: nothing to learn")
        whole, spans = self.marked(messages) if self.has_marks() else self.spans(messages)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        learned = [0] * len(ids)
        offsets: list[Span] = encoded["offset_mapping"]
        token = 0
        for start, end in spans:
            while token < len(ids) and offsets[token][1] <= start:
                token += 1
            first = token
            if first < len(ids) and offsets[first][0] < start:
                raise NotLearnable(
                    "straddles", "a token spans the end of the prompt and the start of the answer"
                )
            while token < len(ids) and offsets[token][0] < end:
                token += 1
            # The token that ends the turn: the last special one in it, or the one that follows a marked turn.
            stops = [place for place in range(first, token) if ids[place] in self.special]
            if stops:
                last = stops[-1]
            elif token < len(ids) and ids[token] in self.special:
                last = token
            else:
                raise NotLearnable(
                    "no_stop", "no token ends the assistant's turn: the model would never stop"
                )
            learned[first : last + 1] = [1] * (last + 1 - first)
        return ids, learned

    def has_marks(self) -> bool:
        """Whether the template has `{% generation %}` marks."""
        return (
            "{% generation" in self.tokenizer.chat_template
            or "{%- generation" in self.tokenizer.chat_template
        )

    def marked(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """The rendered conversation, and the character ranges inside the template's marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, marks = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        spans = [(start, end) for start, end in marks[0] if end > start]
        if not spans:
            raise NotLearnable("turns", "the template's {% generation %} marks are empty")
        return rendered[0], spans

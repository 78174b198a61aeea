"""The experts' page: badly rated answers of this host that wait for a review, and the review form."""

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from llmcore.ratings import FIELD, REVIEWER, TENANT, TIME, VERDICT, Record
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError, unavailable
from llmserve.feedback import reviews
from llmserve.feedback.reviews import LONGEST, TAGS, Item
from llmweb.sections import Cell, Look, Section, Words

log = logging.getLogger("llmweb.reviews")
PAGE = "reviews"
MOST_SHOWN = 20
PREVIEW = 100  # characters of a prompt
FORM_BYTES, FORM_FIELDS = 256 * 1024, len(TAGS) + 4  # a character may take 12 bytes of a form


@dataclass(frozen=True, slots=True)
class Sent:
    """An expert's form. `answer`: the transaction of the rated answer. `rated`: the time of the displayed rating, if the form has
    it.
    """

    answer: str
    rated: str
    verdict: str
    correction: str
    tags: tuple[str, ...]

    @property
    def recorded(self) -> dict[str, object]:
        """The fields for the audit record, without text."""
        return {"llmkeep.review.transactions": [self.answer], "llmkeep.review.verdict": self.verdict}


def sent(form: dict[str, list[str]]) -> Sent:
    """A form's fields; raises ApiError 400 for an unknown verdict."""
    verdict = form.get("verdict", [""])[0]
    if verdict not in ("corrected", "dismissed"):
        raise ApiError(400, "invalid_form", f"'verdict' is {verdict[:40]!r}: send corrected or dismissed")
    correction = form.get("correction", [""])[0].replace("\r\n", "\n").strip()
    answer, rated = (form.get(name, [""])[0] for name in ("answer", "rated"))
    return Sent(answer, rated, verdict, correction, tuple(form.get("tag", [])))


@dataclass(slots=True)
class Reviews:
    """Reads the journal, one reader at a time, since each reads all of it."""

    folder: Path | None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def look[T](self, read: Callable[[Path], T]) -> T:
        """Runs in a thread; raises ApiError 503 if there is no journal, or it cannot be read or written."""
        if self.folder is None:
            raise ApiError(503, "no_journal", "this host keeps no ratings: ask its operator")
        async with self.turn:
            try:
                return await asyncio.to_thread(read, self.folder)
            except OSError as error:
                log.error("the journal cannot be used", extra={"fields": {"error.message": str(error)}})
                raise unavailable(
                    "journal_unavailable", "the journal of ratings cannot be used now: retry later", 5
                ) from None

    async def page(
        self, look: Look, tenants: Collection[str], asked: str | None
    ) -> tuple[str, dict[str, Any], dict[str, object]]:
        """The queue, or the requested answer: a template, its values, and the fields for the audit record."""
        if asked is not None:
            item = await self.item(tenants, asked)
            return "review.html", self.form(look, item), {"llmkeep.review.transactions": [item.transaction]}
        found, waiting, without = await self.look(lambda folder: reviews.queue(folder, tenants, MOST_SHOWN))
        seen: dict[str, object] = {"llmkeep.review.transactions": [each.transaction for each in found]}
        return "page.html", {"sections": [queue(look, found, waiting, without, tenants)]}, seen

    async def item(self, tenants: Collection[str], transaction: str) -> Item:
        """Raises ApiError 404, the same for answers that do not exist and those that the policy does not show."""
        item = await self.look(lambda folder: reviews.item(folder, tenants, transaction))
        if item is None:
            raise ApiError(
                404, "no_such_answer", "there is no such answer to review: it may have been forgotten"
            )
        return item

    async def keep(self, item: Item, reviewer: Identity, given: Sent) -> None:
        """Raises ApiError 400, 404, 409 or 503."""
        if given.rated and given.rated != item.rating[TIME]:
            raise ApiError(
                409,
                "rated_again",
                "the answer was rated again while you were writing: read it, and send your review again",
            )
        correction = given.correction if given.verdict == "corrected" else ""
        if given.verdict == "corrected" and not correction:
            raise ApiError(400, "no_correction", "there is no correction: write one, or dismiss the answer")
        record = reviews.written(item, reviewer, correction, given.tags)

        def keep(folder: Path) -> bool:
            # Looked up once more, so that of two that arrive together the second knows the first.
            again = reviews.item(folder, [item.rating[TENANT]], item.transaction)
            return again is not None and reviews.keep(folder, again, record)

        if not await self.look(keep):
            raise ApiError(
                404, "no_such_answer", "there is no such answer to review: it may have been forgotten"
            )

    def form(self, look: Look, item: Item, given: Sent | None = None, wrong: str = "") -> dict[str, Any]:
        """The values of review.html. `given`: the submitted form, which is `wrong`."""
        review = item.review or {}
        tags = given.tags if given else review.get(FIELD + "tags", [])
        correction = given.correction if given else review.get(FIELD + "correction", "")
        told = [
            (look.say(f"users_{name}"), item.rating.get(FIELD + name, ""))
            for name in ("comment", "correction")
        ]
        return {
            "transaction": item.transaction,
            "rated": item.rating[TIME],
            "kept": f"answer={item.transaction}&",  # of the address, by links to other languages
            "prompt": messages(item.answer.get(FIELD + "prompt")),
            "answer": item.answer.get(FIELD + "answer", ""),
            "rating": " · ".join(each.text for each in facts(look, item)),
            "said": [(name, text) for name, text in told if text],
            "reviewed": look.say(
                "reviewed", by=review[REVIEWER], at=day(review), verdict=look.say(review[VERDICT])
            )
            if review
            else "",
            "tags": [(tag, look.say(f"tag_{tag}"), tag in tags) for tag in TAGS],
            "correction": correction,
            "longest": LONGEST,
            "wrong": wrong,
        }


def queue(look: Look, found: list[Item], waiting: int, without: int, tenants: Collection[str]) -> Section:
    title = look.say("queue")
    notes = [look.say("this_host", host=socket.gethostname())]
    if without:
        notes.append(look.say("without_answer", count=without))
    if not tenants:
        return Words(title, look.say("no_tenants"), "unknown", " ".join(notes))
    if not found:
        return Words(title, look.say("none_waiting"), "" if without else "good", " ".join(notes))
    rows = [
        [Cell(preview(each), "", f"?{urlencode({'answer': each.transaction})}"), *facts(look, each)]
        for each in found
    ]
    columns = [look.say(name) for name in ("asked", "rating", "reason", "model", "tenant", "rated_on")]
    if waiting > len(found):
        notes.append(look.say("left_out", count=waiting - len(found)))
    return look.table(title, columns, rows, notes=notes)


def facts(look: Look, item: Item) -> list[Cell]:
    """Rating, reason, model, tenant and day."""
    rating = item.rating
    stars = rating.get(FIELD + "stars")
    reason = rating.get(FIELD + "reason")
    return [
        Cell(look.say("thumb_down") if stars is None else look.say("stars_of", stars=stars), "bad"),
        Cell(look.say(f"reason_{reason}") if reason else "–"),
        Cell(str(item.answer.get("llm.model", "–"))),
        Cell(rating[TENANT]),
        Cell(day(rating)),
    ]


def day(record: Record) -> str:
    return f"{record[TIME][:16].replace('T', ' ')} UTC"


def messages(prompt: object) -> list[tuple[str, str]]:
    """A prompt as roles and texts; anything else is shown as JSON."""
    if not isinstance(prompt, list):
        return [("user", str(prompt))]
    return [
        (str(each.get("role", "–")), text(each.get("content")))
        if isinstance(each, dict)
        else ("–", text(each))
        for each in prompt
    ]


def text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def preview(item: Item) -> str:
    """The beginning of the user's last question."""
    last = " ".join(messages(item.answer.get(FIELD + "prompt"))[-1:][0][1].split()) or "–"
    return last if len(last) <= PREVIEW else last[:PREVIEW] + "…"

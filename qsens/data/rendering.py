"""Conversations as token ids, by the checkpoint's own chat template; which of them are labels.

Labels are the tokens of the assistant's turns: those between ``{% generation %}`` tags where the
template has some, else what a turn adds to the text before it. Needs transformers.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from qsens.checkpoint.refusals import refusals
from qsens.data.conversations import ASSISTANT, Conversation
from qsens.data.samples import Picture, Samples
from qsens.errors import UserError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_PROBE = "probe"
_TOKENIZER = "the tokenizer of model.path"
_REMEDY = "Take the conversation out of the file, or mend it as the template asks for."


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model reads it.

    Attributes:
        ids: Token ids.
        spans: Where turns of the assistant begin and end in them.
        rewritten: Whether the template writes earlier turns otherwise once others follow, such as
            without their reasoning: then the last one alone is a label.
        text: The text that it is made of.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    rewritten: bool = False
    text: str = ""


def conversation_samples(
    conversations: Sequence[Conversation], tokenizer: Any, *, loss: str, longest: int
) -> Samples:
    """Return samples of conversations, cut at ``longest`` tokens.

    A conversation that is longer ends after the last turn of the assistant that fits; where none
    does, within it.

    Args:
        conversations: The conversations.
        tokenizer: The checkpoint's tokenizer, with its chat template.
        loss: ``assistant``, whose tokens alone are labels, or ``all``.
        longest: Tokens of a sample at most.

    Raises:
        UserError: The template refuses one, or none of its labels fits.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "it has no chat template, and the samples are conversations",
            where=_TOKENIZER,
            remedy="Save the checkpoint's own chat_template.jinja beside it, or use texts.",
        )
    return cut_at(
        longest,
        [render(one, tokenizer, number) for number, one in enumerate(conversations, 1)],
        loss=loss,
    )


def cut_at(
    longest: int,
    given: Sequence[Rendered],
    *,
    loss: str,
    pictures: Sequence[Picture] = (),
) -> Samples:
    """Return samples of rendered conversations, cut at ``longest`` tokens.

    Args:
        longest: Tokens of a sample at most.
        given: The conversations; pictures stand before the first answer that is a label.
        loss: ``assistant``, whose tokens alone are labels, or ``all``.
        pictures: Those of each; none of text.

    Raises:
        UserError: None of the labels of one fits.
    """
    ids, truncated, spans = [], [], []
    for number, rendered in enumerate(given, 1):
        cut = _cut(rendered, longest)
        kept = tuple((start, min(end, cut)) for start, end in rendered.spans if start < cut)
        if not kept and (loss == ASSISTANT or pictures):
            raise UserError(
                f"no token of an answer is among its first {longest}",
                where=f"conversation {number}",
                remedy="Raise dataset.calib_seq_len, or take it out of the file.",
            )
        ids.append(rendered.ids[:cut])
        truncated.append(cut < len(rendered.ids))
        spans.append(kept if loss == ASSISTANT or pictures else ((1, cut),))
    rewritten = sum(rendered.rewritten for rendered in given)
    said = (
        f"{rewritten} of {len(ids)} conversations are written otherwise once more turns follow, "
        "such as without earlier reasoning: of those, the last answer alone is a label "
        "(dataset.turns=each makes a sample of each)",
    )
    notices = said if rewritten and loss == ASSISTANT else ()
    return Samples(tuple(ids), tuple(truncated), tuple(spans), tuple(pictures), notices)


def render(conversation: Conversation, tokenizer: Any, number: int) -> Rendered:
    """Return a conversation as token ids.

    Args:
        conversation: The conversation.
        tokenizer: The tokenizer, with its chat template.
        number: Which one it is, for messages.

    Raises:
        UserError: The template refuses it, or shows no turn of the assistant.
    """
    template = tokenizer.get_chat_template(tools=_tools(conversation))
    if _GENERATION.search(template):
        rendered = _by_tags(conversation, tokenizer, template, number)
    else:
        rendered = _by_prefixes(conversation, tokenizer, number)
    if not rendered.spans:
        raise _refusal("its chat template shows no turn of the assistant", number)
    return rendered


def ask(conversation: Conversation, tokenizer: Any, number: int) -> str:
    """Return a conversation as the text that a model is asked with, up to its answer.

    Args:
        conversation: What comes before the answer.
        tokenizer: The tokenizer, with its chat template.
        number: Which one it is, for messages.

    Raises:
        UserError: The template refuses it.
    """
    count = len(conversation.messages)
    return _text(conversation, count, tokenizer, number, add_generation_prompt=True)


def _by_tags(conversation: Conversation, tokenizer: Any, template: str, number: int) -> Rendered:
    """Find what stands between the template's tags."""
    with _named(number):
        (text,), (places,) = render_jinja_template(
            [_messages(conversation, len(conversation.messages), tokenizer)],
            tools=_tools(conversation),
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return _tokenized(text, places[-1:] if conversation.last else places, tokenizer)


def _by_prefixes(conversation: Conversation, tokenizer: Any, number: int) -> Rendered:
    """Find what each turn adds to the text; the text as a whole is what becomes tokens."""
    messages = conversation.messages
    whole = _text(conversation, len(messages), tokenizer, number)
    answers = [at for at, message in enumerate(messages) if message["role"] == ASSISTANT]
    places, rewritten = [], False
    for at in answers[-1:] if conversation.last else answers:
        place = _place(conversation, at, tokenizer, number)
        if place is None or not whole.startswith(place[0]):
            rewritten = True
        else:
            places.append(place[1])
    if rewritten:
        # As the model once answered: what stood before the last answer, and it.
        place = _place(conversation, answers[-1], tokenizer, number)
        if place is None:
            raise _refusal("its chat template writes a turn otherwise than it asks for it", number)
        whole, places = place[0], [place[1]]
    return _tokenized(whole, places, tokenizer, rewritten=rewritten and not conversation.last)


def _tokenized(
    text: str, places: Sequence[Span], tokenizer: Any, *, rewritten: bool = False
) -> Rendered:
    """Return a text as token ids; labels are the tokens that begin in one of its places."""
    with refusals("its tokenizer fails", where=_TOKENIZER, remedy=_REMEDY):
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = made["input_ids"], made["offset_mapping"]
    spans = []
    for start, end in places:
        inside = [at for at, (begin, _) in enumerate(offsets) if start <= begin < end]
        if inside:
            spans.append((max(1, inside[0]), inside[-1] + 1))
    return Rendered(tuple(ids), tuple(spans), rewritten, text)


def _place(
    conversation: Conversation, at: int, tokenizer: Any, number: int
) -> tuple[str, Span] | None:
    """Return the text up to an answer with where that stands in it.

    None where the text before it is not what the template asks with.
    """
    asked = _text(conversation, at, tokenizer, number, add_generation_prompt=True)
    before = _text(conversation, at, tokenizer, number) if at else ""
    answered = _text(conversation, at + 1, tokenizer, number)
    # A prompt may hold more than an answer begins with, such as an opening of its reasoning.
    pairs = zip(asked, answered, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared < len(before.rstrip()):
        return None
    return answered, (shared, len(answered))


def _text(conversation: Conversation, count: int, tokenizer: Any, number: int, **more: Any) -> str:
    text: str = _apply(conversation, count, tokenizer, number, tokenize=False, **more)
    return text


def _apply(
    conversation: Conversation, count: int, tokenizer: Any, number: int, **options: Any
) -> Any:
    """Apply the chat template to the first ``count`` messages."""
    with _named(number):
        return tokenizer.apply_chat_template(
            _messages(conversation, count, tokenizer), tools=_tools(conversation), **options
        )


def _named(number: int) -> AbstractContextManager[None]:
    """Say of which conversation a template raises something."""
    what = f"its chat template refuses conversation {number}"
    return refusals(what, where=_TOKENIZER, remedy=_REMEDY)


def _messages(conversation: Conversation, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the first ``count`` messages as the template reads them."""
    messages = [dict(message) for message in conversation.messages[:count]]
    if _reads_parts(tokenizer):
        messages = [
            message | {"content": _parts(message["content"])}
            if isinstance(message["content"], str)
            else message
            for message in messages
        ]
    return messages


@functools.cache
def _reads_parts(tokenizer: Any) -> bool:
    """Return whether a template shows a message of parts and not one whose content is text."""
    return not _shows(tokenizer, _PROBE) and _shows(tokenizer, _parts(_PROBE))


def _shows(tokenizer: Any, content: Any) -> bool:
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # templates raise what they like
        return False
    return _PROBE in text


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _tools(conversation: Conversation) -> list[Any] | None:
    return list(conversation.tools) if conversation.tools else None


def _cut(rendered: Rendered, longest: int) -> int:
    """Return how many tokens of a conversation are kept: whole turns where that can be."""
    if len(rendered.ids) <= longest:
        return len(rendered.ids)
    return max((end for _, end in rendered.spans if end <= longest), default=longest)


def _refusal(what: str, number: int) -> UserError:
    return UserError(f"{what}: conversation {number}", where=_TOKENIZER, remedy=_REMEDY)

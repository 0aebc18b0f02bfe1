"""Chat models as actors: the state is a user's message, and an action is the assistant's turn.

    <system>     You answer a question by searching ...          (in front of the state where a family has no such role)
    <user>       <question> Who is the mayor of ...<search> ...</search><document> ...
    <assistant>  <search> ...</search> end of turn               K candidates branch off here

Every turn of an episode is a conversation of its own, since what the model is shown is rendered anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jraggym.chat_model import Message
from jraggym.errors import InputError
from jraggym.text.actions import END_THINK, THINK, format_action
from jraggym.text.batching import Codec, Row
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.rendering import DOCUMENT, FINISH, MALFORMED, NOTHING, QUESTION
from jraggym.types import Action, Answer, Malformed, Search, State

INSTRUCTION = f"""\
You answer a question by searching a collection of documents. Reply with exactly one action and nothing else.
To search, write {format_action(Search("what to look for"))}
As soon as you know the answer, write {format_action(Answer("the answer in as few words as possible"))}
You may think first: {THINK} your thoughts{END_THINK} and then the action, all in one reply.
You are shown the {QUESTION}, your earlier actions, and each {DOCUMENT} that they found. {NOTHING} means that a search \
found no document, {MALFORMED} that a reply was no action, and {FINISH} that you have to answer now."""


def chat_ids(tokenizer: HuggingFaceTokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant begins to write.

    Where a family has no system role, such a message stands in front of the next one. Only the system's words are
    ours: special tokens in all others are broken up. Raises InputError when the template refuses the messages.
    """
    shown, before = [], ""
    for message in messages:
        if message.role == "system" and not tokenizer.has_system:
            before += f"{message.content}\n\n"
            continue
        content = message.content if message.role == "system" else tokenizer.defuse(message.content)
        shown.append({"role": message.role, "content": before + content})
        before = ""
    if before:
        shown.append({"role": "user", "content": before.strip()})
    return tokenizer.chat(shown)


def reply_ids(tokenizer: HuggingFaceTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of an assistant's replies, each with the end of its turn; a special token in one is text and ends none."""
    return [[*ids, tokenizer.end_ids[0]] for ids in tokenizer.encode([tokenizer.defuse(text) for text in texts])]


def chat_row(
    tokenizer: HuggingFaceTokenizer,
    messages: Sequence[Message],
    texts: Sequence[str],
    rewards: Sequence[float | None] | None = None,
) -> Row:
    """A chat with K candidate replies, as critics read it: in training, with rewards, and when they score.

    With rewards, repeated texts and unlabelled candidates do not count. Raises InputError when the template refuses
    the messages.
    """
    actions, known = reply_ids(tokenizer, texts), [0.0] * len(texts) if rewards is None else rewards
    counts = [r is not None and (rewards is None or texts[i] not in texts[:i]) for i, r in enumerate(known)]
    own = [[True] * len(ids) for ids in actions]
    return Row(chat_ids(tokenizer, messages), actions, own, [r or 0.0 for r in known], counts)


@dataclass(frozen=True, slots=True)
class ChatCodec(Codec):
    """A codec in the words of a chat model; `instruction` explains the actions."""

    tokenizer: HuggingFaceTokenizer
    instruction: str = INSTRUCTION

    appends: ClassVar[bool] = False

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end the assistant's turn."""
        return self.tokenizer.end_ids

    def encode(self, actions: Sequence[str]) -> list[list[int]]:
        """Ids of each action, the end of the turn included."""
        return [[*ids, self.stops[0]] for ids in self.tokenizer.encode(actions)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each sampled action, without the token that ended it."""
        return self.tokenizer.decode([row[:-1] if len(row) and row[-1] in self.stops else row for row in ids])

    def prompt_ids(self, segments: Sequence[str]) -> list[int]:
        """Ids of the conversation up to where the assistant begins to write."""
        return chat_ids(self.tokenizer, (Message("system", self.instruction), Message("user", "".join(segments))))

    def episode(self, final: State) -> Row:
        """Raises InputError: the turns of an episode are conversations of their own, see `imitations`."""
        raise InputError("a chat has no whole episodes", got=final.question, remedy="Train on its turns one by one.")

    def imitations(self, final: State) -> list[Row]:
        """A finished episode as one row for each well-formed action, with that action and reward 1."""
        actions: list[tuple[int, Action]] = [(number, turn.action) for number, turn in enumerate(final.turns)]
        if final.answer is not None:
            actions.append((len(final.turns), Answer(final.answer, final.thought)))
        return [
            self.row(State(final.question, final.turns[:number]), [format_action(action)], [1.0])
            for number, action in actions
            if not isinstance(action, Malformed)
        ]

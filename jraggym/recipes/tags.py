"""Tag protocols on the embedded world: short prompts, a tokenizer that may know the tags, scripted transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jraggym.chat_model import Message
from jraggym.errors import InputError
from jraggym.protocols import PROTOCOLS
from jraggym.protocols.protocol import Protocol, observation, opening, plain
from jraggym.recipes.quickstart import Workshop, fitting, scripted
from jraggym.recipes.settings import Settings
from jraggym.recipes.task import Task
from jraggym.text.batching import Row
from jraggym.text.grouping import group
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer, Tokenizer
from jraggym.transcript_gathering import prompt_ids
from jraggym.transcripts import Transcript
from jraggym.types import Answer, Search, Segment, State

NAMES = ("research_rl", "search_r1")  # the protocols that are written by script here
FIRST = "nothing known"  # the thought of a scripted first turn


def embedded(protocol: Protocol) -> Protocol:
    """The protocol for a tiny model: a few words of prompt, and an answer ends the episode without an end token.

    Its tokenizer has no end token. A model from scratch cannot follow a prompt, and long texts cost it most.
    """
    return replace(
        protocol,
        prompt=(Message("user", "Think, then search or answer.\nQuestion: {question}"),),
        closed_prompt=(Message("user", "Think, then answer.\nQuestion: {question}"),),
        stops=tuple(pair[1] for pair in (protocol.search, protocol.answer) if pair),
        needs_end=False,
        document=" {title} | {text}",  # a name after a space is spelt as inside a sentence
        invalid=protocol.invalid and "\nNo action.\n",
    )


def protocol_for(name: str, tokenizer: Tokenizer) -> Protocol:
    """The protocol `name`, as published for a chat model and `embedded` for another; raises InputError."""
    if name not in NAMES:
        raise InputError("unknown protocol", got=name, remedy=f"Use one of {', '.join(NAMES)}.")
    published = PROTOCOLS[name]
    return published if isinstance(tokenizer, HuggingFaceTokenizer) else embedded(published)


def write_action(protocol: Protocol, action: Search | Answer) -> str:
    """A turn of the model in good form; `read_action` gives the action back."""
    body = action.query if isinstance(action, Search) else action.text
    if isinstance(action, Answer) and "boxed" in protocol.extract:
        body = rf"\boxed{{ {body} }}"
    think, tags = protocol.think, protocol.search if isinstance(action, Search) else protocol.answer
    if think is None or tags is None:
        raise InputError("only turns of tags are written", got=protocol.name, remedy=f"Use one of {', '.join(NAMES)}.")
    return f"{think[0]} {action.thought or FIRST}{think[1]}{tags[0]} {body}{tags[1]}"


def scripted_transcript(protocol: Protocol, tokenizer: Tokenizer, final: State) -> Transcript:
    """A finished scripted episode in the protocol's words, token by token as a rollout would hold it."""
    found = Transcript.start(prompt_ids(tokenizer, protocol, final.question))
    parts: list[tuple[str, Segment, int]] = []
    for number, turn in enumerate(final.turns):
        if not isinstance(turn.action, Search):
            raise InputError("only searches and answers are written", got=turn.action, remedy="Script no other.")
        parts.append((write_action(protocol, turn.action), Segment.MODEL, number))
        parts.append((observation(protocol, turn.documents), Segment.OBSERVATION, number))
    if final.answer is not None:
        answer = write_action(protocol, Answer(final.answer, final.thought))
        parts.append((answer, Segment.MODEL, len(final.turns)))
    for (_, segment, number), ids in zip(parts, tokenizer.encode([text for text, *_ in parts]), strict=True):
        found = found.append(ids, segment, number)
    return found


def scripted_rows(shop: Workshop, protocol: Protocol) -> list[Row]:
    """The world's imperfect demonstrations, a transcript as the one candidate of its prompt."""
    finals = [episode.final for _, episode in scripted(shop)]
    found = [scripted_transcript(protocol, shop.tokenizer, final) for final in finals]
    return fitting(shop, [group([transcript], [1.0]) for transcript in found])


def tag_tokenizer(task: Task, settings: Settings, protocol: Protocol, single: bool) -> SentencePieceTokenizer:
    """SentencePiece on all that stands between tags; a tag is one piece, or several where `single` is False."""
    split = task.train
    bare = replace(protocol, observation="{found}")
    texts = [observation(bare, [document]) for document in split.corpus.documents]
    for example in split.examples[:6_000]:
        plan = split.plans[example.id]
        answer = write_action(protocol, Answer(plan.answer))
        texts += [plain(opening(protocol, example.question)), *(f" {text}" for text in (*plan.thoughts, *plan.queries))]
        texts += _without(protocol.tags, answer)
    return SentencePieceTokenizer.train(texts, settings.vocab, protocol.tags if single else ())


def _without(tags: Sequence[str], text: str) -> list[str]:
    for tag in tags:
        text = text.replace(tag, "\n")
    return [part for part in text.split("\n") if part]

"""An agent over your own documents, in a notebook or a script:

    from jraggym.ask import ask
    from jraggym.chats.opening import Server, open_chat
    from jraggym.types import Document

    documents = [
        Document("tarvan", "Tarvan", "The river Tarvan rises in the town of Morn."),
        Document("morn", "Morn", "Morn is a hill town. Its mayor is Ada Lindqvist."),
    ]
    chat = open_chat(Server("gpt-4o-mini", key_variable="OPENAI_API_KEY"))
    [episode] = ask(["Who is the mayor of the town where the Tarvan rises?"], documents, chat, agent="re2search")
    for turn in episode.trajectory.final.turns:
        print(turn.action.query, "->", turn.digest)
    print(episode.trajectory.final.answer, episode.costs)

`Local("models/my-checkpoint")` in place of the server runs a model on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from jraggym.agent_episodes import AgentRules, Scorer, run_agent
from jraggym.agents import AGENTS
from jraggym.agents.digests import Summariser
from jraggym.agents.episode import Episode
from jraggym.chat_model import ChatModel
from jraggym.errors import InputError
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.scripted import Lookup
from jraggym.types import Document, Example


def ask(
    questions: Sequence[str],
    documents: Sequence[Document] | Lookup,
    chat: ChatModel,
    *,
    agent: str = "re2search",
    rules: AgentRules | None = None,
    scorer: Scorer | None = None,
) -> list[Episode]:
    """Lets an agent answer the questions, all at once, and gives an episode for each: its turns, answer and costs.

    Args:
      documents: to be searched by BM25, eight a search; or any function from queries to the documents of each.
      agent: a name of `jraggym.agents.AGENTS`; the model that plays it also makes its digests.
      rules: budget and sampling; ten turns, greedily, if None.
      scorer: a critic (`open_scorer`) that picks among the candidates, with `rules.select` "score".

    Raises:
      InputError: for an unknown agent, no documents, an empty question, and as `run_agent`.
    """
    if agent not in AGENTS:
        raise InputError("unknown agent", got=repr(agent), remedy=f"Use one of {', '.join(AGENTS)}.")
    if isinstance(questions, str):
        raise InputError("questions must be a list", got="one text", remedy="Write [question].")
    look_up = documents if callable(documents) else HybridRetriever(Corpus.from_documents(documents), k=8)
    # nobody knows the answers, and nothing that an agent does depends on them
    examples = [Example(f"question {number}", question, ("",)) for number, question in enumerate(questions, 1)]
    return run_agent(
        AGENTS[agent], chat, examples, look_up, rules or AgentRules(), summariser=Summariser(chat), scorer=scorer
    )

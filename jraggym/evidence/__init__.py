"""Evidence search: a critic chooses among proposed queries, step by step, without a language model.

    State ── propose ──> Proposals ── critic ──> the best few ── retriever ──> documents not read before ──> State

It is RAG-Gym's loop with the actor replaced by a list of proposals: what is left is the critic's own worth.
"""

"""Sources of process rewards, one file each, behind one signature: Sequence[Decision] -> rewards or None.

support     the rule-based judge over supporting documents         ranks     looks at what searches bring
llm_judge   a chat model ranks the candidates                      ranks     looks at question, history, candidates
rollouts    mean outcome of continuations (Math-Shepherd)          [0, 1]    runs a policy
outcome     the episode's outcome for what was executed (ORM)      [0, 1]    knows the collected episodes
human       labels from a jsonl file                               [0, 1]    knows the file
control     random ranks                                           ranks     looks at nothing

`relabel` puts any of them on collected data.
"""

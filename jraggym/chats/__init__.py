"""Chat models behind the one signature of `jraggym.chat_model`, and the critic that reranks what they write."""

"""The language-model side: resolving, loading, tokens, splicing. Knows nothing of SAEs."""

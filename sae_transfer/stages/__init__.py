"""Each stage of a study: what its numbers depend on, and the call that makes them. Config objects stop here."""

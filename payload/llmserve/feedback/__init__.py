"""User feedback: signed answer ids, and a journal of ratings and of the rated answers."""

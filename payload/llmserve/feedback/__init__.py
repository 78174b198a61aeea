"""What users think of answers: signed ids of answers, and a journal of ratings and of what was rated."""

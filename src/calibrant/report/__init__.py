"""Pages for people: model cards."""

"""A model for people and programs: the HTTP service, its chat page, and the same in a terminal."""

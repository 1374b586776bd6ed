"""The verified-data factory: candidate solutions from a teacher, of which only what a rule proves right is kept."""

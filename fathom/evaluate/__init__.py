"""How good is a model, how sure is that, and what does it cost? Measured on held-out problems, checked by rule."""

"""Stages of training one after another, and what each of them gained."""

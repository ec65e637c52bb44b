"""Prompts in: data sets to prompts (`datasets`), their order (`cursor`), messages to tokens (`chat`).

Importing this package loads nothing: take what is needed from its files.
"""

"""What a stage can learn by: next token, and BLIP-2's three (arXiv 2301.12597)."""

CAPTION_OBJECTIVES = ("contrastive", "matching", "grounded_generation")
"""Objectives of a Q-Former with its text branch; they read captions."""

OBJECTIVES = ("next_token", *CAPTION_OBJECTIVES)

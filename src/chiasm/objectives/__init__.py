"""What a stage can learn by: next token, BLIP-2's three (arXiv 2301.12597), late fusion's, and an image tokenizer's."""

CAPTION_OBJECTIVES = ("contrastive", "matching", "grounded_generation")
"""Objectives of a Q-Former with its text branch; they read captions."""

PAIR_OBJECTIVES = ("contrastive", "sigmoid")
"""Objectives of two towers: each caption's own picture, by a softmax (CLIP) or pair by pair (SigLIP)."""

PICTURE_OBJECTIVES = ("reconstruction",)
"""Objectives of an image tokenizer; they read pictures and no words."""

OBJECTIVES = ("next_token", *CAPTION_OBJECTIVES, "sigmoid", "answers", *PICTURE_OBJECTIVES)

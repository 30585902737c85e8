"""Loading a language model and reaching its embeddings, layers and head."""

"""An OpenAI-compatible HTTP interface and a chat page for models that run here."""

"""Models on disk: read any checkpoint, open and save Hugging Face folders, and fetch published models."""

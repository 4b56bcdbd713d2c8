"""Models on disk: checkpoints that anyone trained, Hugging Face folders, and where to fetch them."""

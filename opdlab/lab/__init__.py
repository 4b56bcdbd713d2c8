"""The book's own experiments: its scales, arms and tasks, their records, and how they are made."""

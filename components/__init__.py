"""What any trainer of language models has: nothing here knows of thoughts, runs or validation."""

"""What any trainer of language models has. It imports config and curriculum, and nothing else of the core."""

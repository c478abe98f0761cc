"""What a user can ask for; each module reads as the story of one command."""

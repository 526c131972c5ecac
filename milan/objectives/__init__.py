"""What a student is trained to predict."""

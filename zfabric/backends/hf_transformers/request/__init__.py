"""What is asked and how far its answer is: sequences, rows and what bounds them."""

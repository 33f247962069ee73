"""What the pages under docs/ say about the code and about each other is true."""

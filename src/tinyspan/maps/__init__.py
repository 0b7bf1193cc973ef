"""Linear maps V of one block, from k coordinates to its D numbers."""

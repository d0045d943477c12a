"""How sharp each row is: temperatures that are learned, and weights of features."""

"""Linear attention: features of queries and keys whose products are the weights."""

"""Tables, reports and comparisons of results."""

"""From results to tables, pages and comparisons."""

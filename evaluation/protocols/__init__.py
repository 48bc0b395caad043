"""Named protocols, their data sets and what they ask to be drawn."""

"""Work shared by processes, and how far it is."""

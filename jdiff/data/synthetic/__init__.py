"""Small seeded data sets with known answers: graphs, point sets. NumPy on the host; nothing is downloaded."""
